"""Where the time of a step goes on each rank, and which rank the others wait for."""

import resource
import socket
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchrec.distributed.types import LazyAwaitable

from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection

_UNREAD_EVENTS = 4096
_Item = TypeVar("_Item")
_PARTS = ("data_wait", "forward", "exchange", "backward", "checkpoint")
# What ranks gather: seconds since the last report; the last column is the rank's own work, without waiting for others.
_GATHERED = ("step", *_PARTS, "other", "own")


class Stopwatch:
    """Adds up intervals by name; on CUDA, intervals between events of a stream, without waiting for them.

    Args:
        device: the device whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, float] = {}
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def is_host(self) -> bool:
        """Whether the host's time is measured."""
        return self._device.type != "cuda"

    def now(self, stream: torch.Stream | None = None) -> Any:
        """Return the current time, or on CUDA an event of ``stream``, by default the current one."""
        if self.is_host:
            return time.perf_counter()
        stream = stream or torch.cuda.current_stream(self._device)
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    def add(self, name: str, start: Any, end: Any) -> None:
        """Add the time between two results of ``now``."""
        if self.is_host:
            self.add_seconds(name, end - start)
            return
        self._unread.append((name, start, end))
        while len(self._unread) > _UNREAD_EVENTS:  # the oldest have long passed: this does not wait
            self._read()

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._sums[name] = self._sums.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return seconds by name since the last call. On CUDA this waits for the last interval."""
        while self._unread:
            self._read()
        sums, self._sums = self._sums, {}
        return sums

    def _read(self) -> None:
        name, start, end = self._unread.popleft()
        end.synchronize()
        self.add_seconds(name, start.elapsed_time(end) / 1e3)


class StepTimer:
    """Measures the parts of this rank's steps, and reports those of all ranks.

    - ``step``: the time from one step to the next, including the caller's work between them.
    - ``data_wait``: the time until the loader has a batch.
    - ``exchange``: the time from entering the embeddings in forward to the arrival of their output, without the
      lookups: exchanging ids and vectors with other ranks, waiting for them, and processing them, such as W2's
      projection; in the pipeline also exchanging the next batch's ids, and under ``train.on_non_finite: skip`` the
      agreement on losses.
    - ``forward``: the rest of forward: lookups, dense layers, the loss.
    - ``backward``: backward and the update. The exchange of gradients happens inside autograd functions, so it is
      included here, as is the waiting for ranks that enter backward later.
    - ``checkpoint``: the time that saving blocks training.
    - ``other``: the remaining time of the step: metrics, records, copies of batches, and Python in between. On CUDA
      the next batch's ids are exchanged while the device computes, and their time is not subtracted here.

    Ranks take their steps together, so the step time does not tell which rank is slow. The time that no other rank
    prolongs does: data_wait, forward and the update.

    On CUDA, forward, exchange and backward are measured on the stream between events, and the rest on the host.

    Args:
        model: the sharded model; hooks are registered on its embeddings until the context exits.
        device: the device of the model.
        local_batch_size: rows of a batch on this rank.
    """

    def __init__(self, model: nn.Module, device: torch.device, local_batch_size: int) -> None:
        self._watch, self._device, self._rows = Stopwatch(device), device, local_batch_size
        self._hooks: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, ShardedMultiLayerEmbeddingBagCollection):
                self._hooks += _hooks_on_exchange(module, self._watch)
        self._hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._steps, self._all_steps = 0, 0
        self._seconds = torch.zeros(len(self._hosts), len(_GATHERED), dtype=torch.float64)
        self._memory = torch.zeros(len(self._hosts), dtype=torch.float64)
        self._forward_ended: Any = None
        self._started = time.perf_counter()

    def __enter__(self) -> "StepTimer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def fetch(self, batches: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the same batches, and count the time spent waiting for them as ``data_wait``."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waited = time.perf_counter() - started
            self._watch.add_seconds("data_wait", waited)
            if self._forward_ended is not None and self._watch.is_host:
                self._watch.add_seconds("backward", -waited)
            yield batch

    @contextmanager
    def phase(
        self, name: Literal["forward", "exchange", "ids", "update"], stream: torch.Stream | None = None
    ) -> Iterator[None]:
        """Measure the block; ``exchange`` is nested in ``forward``, and ``ids`` is exchange anywhere else.

        Args:
            name: of the phase.
            stream: that works on it on CUDA; None for the current one.
        """
        started = self._watch.now(stream)
        yield
        ended = self._watch.now(stream)
        self._watch.add(name, started, ended)
        if name == "ids" and self._watch.is_host and self._forward_ended is not None:
            self._watch.add("ids before backward", started, ended)
        if name == "forward":
            self._forward_ended = ended

    def add_checkpoint_seconds(self, seconds: float) -> None:
        """Add seconds to ``checkpoint``."""
        self._watch.add_seconds("checkpoint", seconds)

    def exclude(self, seconds: float) -> None:
        """Do not count the last ``seconds``, in which no step was taken."""
        self._started += seconds

    def end_backward(self) -> None:
        """Mark the end of backward; only the step's update is left."""
        self._watch.add("backward", self._forward_ended, self._watch.now())
        self._forward_ended = None
        self._steps += 1

    def report(self) -> dict[str, Any]:
        """Return times of the steps since the last report. A collective call, which on CUDA waits for the device.

        Returns:
            ``step_ms`` and its parts ``data_wait_ms``, ``forward_ms``, ``exchange_ms``, ``backward_ms``,
            ``checkpoint_ms`` and ``other_ms``: milliseconds of one step, means over ranks. ``rank_samples_per_s``: a
            list with each rank's rows per second of its own time, and their ``…_min``, ``…_median`` and ``…_max``.
            ``slowest_rank``, ``slowest_host``: the rank with the lowest rate. ``rank_data_wait_ms``: a list,
            milliseconds of one step. ``rank_peak_memory_bytes``: a list of peaks since the start, and their maximum as
            ``peak_memory_bytes``.
        """
        seconds, self._memory = self._gather()
        steps, self._steps = self._steps, 0
        self._seconds += seconds
        self._all_steps += steps
        return self._describe(seconds / steps)

    def summary(self) -> dict[str, Any]:
        """Return a report on all steps reported so far, with ``rank_hosts``; empty if there were none."""
        if not self._all_steps:
            return {}
        return self._describe(self._seconds / self._all_steps) | {"rank_hosts": self._hosts}

    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each rank's seconds since the last report, ``(R, len(_GATHERED))``, and peak memory, ``(R,)``."""
        now = time.perf_counter()
        taken = defaultdict(float, self._watch.take())
        taken["step"], self._started = now - self._started, now
        taken["forward"] -= taken["exchange"]
        taken["exchange"] += taken["ids"]
        taken["backward"] += taken["update"] - taken["ids before backward"]
        overlapped = 0.0 if self._watch.is_host else taken["ids"]
        taken["other"] = taken["step"] + overlapped - sum(taken[name] for name in _PARTS)
        taken["own"] = taken["data_wait"] + taken["forward"] + taken["update"]
        numbers = [taken[name] for name in _GATHERED] + [self._peak_memory()]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        every = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(every, mine)
        gathered = torch.stack(every).cpu()
        return gathered[:, :-1], gathered[:, -1]

    def _describe(self, seconds: torch.Tensor) -> dict[str, Any]:
        """Return the fields of a report from the seconds of a step, ``(R, len(_GATHERED))``."""
        means = dict(zip(_GATHERED, (seconds.mean(dim=0) * 1e3).tolist(), strict=True))
        rates = self._rates(seconds)
        slowest = int(rates.argmin())
        return {f"{name}_ms": means[name] for name in ("step", *_PARTS, "other")} | {
            "rank_samples_per_s_min": float(rates.min()),
            "rank_samples_per_s_median": float(rates.median()),
            "rank_samples_per_s_max": float(rates.max()),
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
            "peak_memory_bytes": int(self._memory.max()),
            "rank_samples_per_s": rates.tolist(),
            "rank_data_wait_ms": (seconds[:, _GATHERED.index("data_wait")] * 1e3).tolist(),
            "rank_peak_memory_bytes": self._memory.long().tolist(),
        }

    def _rates(self, seconds: torch.Tensor) -> torch.Tensor:
        """Return each rank's rows per second of its own time, ``(R,)``."""
        return self._rows / seconds[:, _GATHERED.index("own")]

    def _peak_memory(self) -> int:
        """Return the peak since the start in bytes: of tensors on CUDA, of the process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hooks_on_exchange(module: ShardedMultiLayerEmbeddingBagCollection, watch: Stopwatch) -> list[RemovableHandle]:
    """Count all of a forward pass between lookups, and until the output has arrived, as ``exchange``."""
    left: list[Any] = []

    def leave(*_: Any) -> None:
        left[:] = [watch.now()] if module.training else []

    def arrive(*_: Any) -> None:
        if left:
            watch.add("exchange", left.pop(), watch.now())

    def wait_for_output(_: nn.Module, __: Any, output: LazyAwaitable) -> None:
        def arrived(value: Any) -> Any:
            arrive()
            return value

        output.callbacks.append(arrived)

    lookups = module._lookups
    return [
        module.register_forward_pre_hook(leave),
        *(lookup.register_forward_pre_hook(arrive) for lookup in lookups),
        *(lookup.register_forward_hook(leave) for lookup in lookups),
        module.register_forward_hook(wait_for_output),
    ]
