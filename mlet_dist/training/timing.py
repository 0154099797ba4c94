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


class Stopwatch:
    """Adds up intervals by name. On CUDA they lie between events of the current stream, read when they have passed.

    Args:
        device: whose time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, float] = {}
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def is_host(self) -> bool:
        """Whether the host's time is taken."""
        return self._device.type != "cuda"

    def now(self) -> Any:
        """This moment."""
        if self.is_host:
            return time.perf_counter()
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))

    def add(self, name: str, start: Any, end: Any) -> None:
        """Count the time between two moments."""
        if self.is_host:
            self.add_seconds(name, end - start)
            return
        self._unread.append((name, start, end))
        while len(self._unread) > _UNREAD_EVENTS:  # of long ago: nothing is waited for
            self._read()

    def add_seconds(self, name: str, seconds: float) -> None:
        """Count what was measured otherwise."""
        self._sums[name] = self._sums.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call. On CUDA it waits for the last interval."""
        while self._unread:
            self._read()
        found, self._sums = self._sums, {}
        return found

    def _read(self) -> None:
        name, start, end = self._unread.popleft()
        end.synchronize()
        self.add_seconds(name, start.elapsed_time(end) / 1e3)


_Item = TypeVar("_Item")
_PARTS = ("data_wait", "forward", "exchange", "backward", "checkpoint")
# What a rank tells the others: seconds since the last report, the last by its own work alone.
_TOLD = ("step", *_PARTS, "other", "own")


class StepTimer:
    """Times the steps of this rank; a report tells all ranks how long those of each took.

    - ``step``: from one step to the next, the caller's work between them included.
    - ``data_wait``: until the loader has a batch.
    - ``exchange``: forward from entering the embeddings to the arrival of their output, without the lookups: ids and
      vectors of other ranks, with the waiting for them and what is done to them on the way, such as W2's projection;
      in the pipeline the next batch's ids, which go ahead; and under ``train.on_non_finite: skip`` the ranks' losses.
    - ``forward``: the rest of forward: lookups, dense layers, the loss.
    - ``backward``: backward and the update. The exchange of gradients is inside autograd's functions: it is in here,
      and so is the waiting for ranks that enter backward later.
    - ``checkpoint``: what saving holds up.
    - ``other``: what is left of the step: the caller's metrics and records, copies of batches, and Python between.

    Ranks take their steps together. What tells a slow one is its own time, which no other rank prolongs: data_wait,
    forward and the update.

    On CUDA, forward, exchange and backward are times of the stream between events; the others are the host's.

    Args:
        model: sharded; hooks stay on its embeddings within the block.
        device: where it runs.
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
        self._seconds = torch.zeros(len(self._hosts), len(_TOLD), dtype=torch.float64)
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
        """The same batches, whose waiting for is counted as ``data_wait``."""
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
    def phase(self, name: Literal["forward", "exchange", "ids", "update"]) -> Iterator[None]:
        """Count the block; ``exchange`` is inside ``forward``, and ``ids`` is exchange anywhere else."""
        started = self._watch.now()
        yield
        ended = self._watch.now()
        self._watch.add(name, started, ended)
        if name == "ids" and self._forward_ended is not None:
            self._watch.add("ids before backward", started, ended)
        if name == "forward":
            self._forward_ended = ended

    def saved_for(self, seconds: float) -> None:
        """Count seconds as ``checkpoint``."""
        self._watch.add_seconds("checkpoint", seconds)

    def backward_done(self) -> None:
        """All of a step is over but its update."""
        self._watch.add("backward", self._forward_ended, self._watch.now())
        self._forward_ended = None
        self._steps += 1

    def report(self) -> dict[str, Any]:
        """Of the steps since the last report; a collective call, which on CUDA waits for the device.

        Returns:
            ``step_ms`` and its parts, ``data_wait_ms``, ``forward_ms``, ``exchange_ms``, ``backward_ms``,
            ``checkpoint_ms`` and ``other_ms``: of one step, means over ranks. ``rank_samples_per_s``: a list by rank of
            its rows by its own time, and of these ``…_min``, ``…_median`` and ``…_max``. ``slowest_rank``,
            ``slowest_host``: the rank with the fewest. ``rank_data_wait_ms``: a list, of one step.
            ``rank_peak_memory_bytes``: a list, since the start, and its largest as ``peak_memory_bytes``.
        """
        seconds, self._memory = self._tell()
        steps, self._steps = self._steps, 0
        self._seconds += seconds
        self._all_steps += steps
        return self._describe(seconds / steps)

    def summary(self) -> dict[str, Any]:
        """As a report, of all steps that were reported, and ``rank_hosts``; empty where there was none."""
        if not self._all_steps:
            return {}
        return self._describe(self._seconds / self._all_steps) | {"rank_hosts": self._hosts}

    def _tell(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Seconds of every rank since the last report, ``(ranks, len(_TOLD))``, and peaks of memory, ``(ranks,)``."""
        now = time.perf_counter()
        found = defaultdict(float, self._watch.take())
        found["step"], self._started = now - self._started, now
        found["forward"] -= found["exchange"]
        found["exchange"] += found["ids"]
        found["backward"] += found["update"] - found["ids before backward"]
        found["other"] = found["step"] - sum(found[name] for name in _PARTS)
        found["own"] = found["data_wait"] + found["forward"] + found["update"]
        numbers = [found[name] for name in _TOLD] + [self._peak_memory()]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        every = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(every, mine)
        told = torch.stack(every).cpu()
        return told[:, :-1], told[:, -1]

    def _describe(self, seconds: torch.Tensor) -> dict[str, Any]:
        """The fields of a report from seconds a step ``(ranks, len(_TOLD))``."""
        means = dict(zip(_TOLD, (seconds.mean(dim=0) * 1e3).tolist(), strict=True))
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
            "rank_data_wait_ms": (seconds[:, _TOLD.index("data_wait")] * 1e3).tolist(),
            "rank_peak_memory_bytes": self._memory.long().tolist(),
        }

    def _rates(self, seconds: torch.Tensor) -> torch.Tensor:
        """Rows a second of each rank's own time."""
        return self._rows / seconds[:, _TOLD.index("own")]

    def _peak_memory(self) -> int:
        """Bytes, since the start: of tensors on CUDA, of the process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hooks_on_exchange(module: ShardedMultiLayerEmbeddingBagCollection, watch: Stopwatch) -> list[RemovableHandle]:
    """Count as ``exchange`` all of a forward pass between two lookups, and until the output is there."""
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
