"""Where the time of a step goes on each rank, and which rank the others wait for."""

import resource
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torchrec.distributed.types import LazyAwaitable

from mlet_dist.embeddings.sharding import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.training.stopwatch import Stopwatch

_Item = TypeVar("_Item")
# In the order in which ranks send them to one another.
_MEASURED = ("step", "data_wait", "forward", "exchange", "backward", "checkpoint", "own", "peak_memory_bytes")
_PARTS = _MEASURED[:6]


class StepTimer:
    """Times the steps of one rank, and tells all ranks how long those of each took.

    ``forward`` is lookups, projections and dense layers. ``exchange`` is what the forward pass waits for: the ids and the
    vectors of other ranks, from the module's entry to its first lookup (in the plain loop this holds the work on the
    ids before they leave, too) and from its exit to the arrival of its output. ``backward`` is the rest of the step,
    from the loss to the end of the update; the exchange of gradients inside it runs in autograd's own functions and is
    not told apart. ``own`` is what no other rank can prolong: the whole step without ``exchange``, ``checkpoint`` and
    backward proper. Ranks take steps together, so only by this time can one be called the slowest.

    On CUDA ``forward``, ``exchange`` and ``backward`` are times of the stream, and the others of the host.

    Args:
        model: sharded; hooks on its collections stay as long as the block.
        device: where it runs.
        local_batch_size: rows of a batch on this rank.
    """

    def __init__(self, model: nn.Module, device: torch.device, local_batch_size: int) -> None:
        self._watch, self._device, self._rows = Stopwatch(device), device, local_batch_size
        self._steps, self._started = 0, time.perf_counter()
        self._loss_known: Any = None
        self._hooks = ExitStack()
        for module in model.modules():
            if isinstance(module, ShardedMultiLayerEmbeddingBagCollection):
                self._watch_exchange(module)
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._totals = torch.zeros(len(self._hosts), len(_MEASURED), dtype=torch.float64)
        self._all_steps = 0

    def fetch(self, batches: Iterator[_Item]) -> Iterator[_Item]:
        """The same batches; the time until each is there is ``data_wait``."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_waited(time.perf_counter() - started)
            yield batch

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as ``forward``, ``exchange`` (inside ``forward``), ``update`` or ``checkpoint``."""
        started = self._watch.now()
        yield
        ended = self._watch.now()
        self._watch.add(name, started, ended)
        if name == "forward":
            self._loss_known = ended

    def backward_done(self) -> None:
        """Backward has ended, or was left out, and with it all of the step but its update."""
        self._watch.add("backward", self._loss_known, self._watch.now())
        self._loss_known = None
        self._steps += 1

    def report(self) -> dict[str, float | str]:
        """Per step since the last report; a collective call, and on CUDA it waits for the device.

        Returns:
            ``step_ms``, ``data_wait_ms``, ``forward_ms``, ``exchange_ms``, ``backward_ms``, ``checkpoint_ms``: means
            over ranks; ``rank_samples_per_s_min``, ``…_median``, ``…_max``: rows of a rank by its own time;
            ``slowest_rank`` and ``slowest_host`` by the same; ``peak_memory_bytes``: of the rank that took most.
        """
        measured = self._gather()
        self._totals += measured * self._steps_of(measured)
        ...
