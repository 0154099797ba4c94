"""What all ranks know together, a step later, without waiting for it."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed as dist


class Vote:
    """The largest of what the ranks said, value by value.

    The ranks' clocks and signals differ, yet all must do the same after the same step. So what they say after one step
    is summed up behind the next one, and known to all after it. The group is gloo's: the device does not wait either.

    Args:
        values: how many numbers a rank says at a time.
        timeout: in which every rank must have said them.
    """

    def __init__(self, values: int, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._said = torch.zeros(values, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def cast(self, values: Sequence[int]) -> list[int]:
        """Say something; returns the largest of what the ranks said last time, zeros the first time. Collective."""
        known = self.result()
        self._said = torch.tensor(values, dtype=torch.int64)
        self._pending = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return known

    def result(self) -> list[int]:
        """The largest of what was said last, waiting for the other ranks."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return [int(value) for value in self._said]
