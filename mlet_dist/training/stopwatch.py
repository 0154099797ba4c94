"""Intervals of the host's time, or of a CUDA stream's without waiting for it."""

import time
from collections import deque
from typing import Any

import torch

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
