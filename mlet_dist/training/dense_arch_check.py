"""Notices a dense arch whose output is the same for every row, so that the model ignores its dense columns."""

import math
from collections import deque

import torch
from torch import distributed as dist
from torch import nn
from torchrec.models.dlrm import DenseArch

from mlet_dist.training.state import Training

_ROWS = 1024  # of a model that is well, few rows can all have an output of 0
_SAME = 1e-6  # a range of an output below this share of its values is rounding
_ADVICE = (
    "the ReLU of one of its layers is 0 for all rows, and no gradient can change that; start again with "
    "optimizer.warmup_steps, a lower optimizer.learning_rate or another train.seed"
)


class DenseArchCheck:
    """Checks, when it is called, the output of the dense arch (bottom MLP) for the rows of the last steps.

    Adagrad's first steps move every weight by the learning rate, whatever its gradient. In some runs this leaves the
    last layer's ReLU at 0 for all rows, from which it never recovers. For the few rows of a small batch it can be 0 in
    a model that is well, so the rows are those of as many global batches as have 1,024 together, and an incomplete
    batch tells nothing.

    Attributes:
        varies: whether the output varied over the rows that were checked last; None before a check, or where the dense
            columns do not vary either.
    """

    def __init__(self, training: Training) -> None:
        self.varies: bool | None = None
        self._dense_arch = _dense_arch(training.model)
        self._warned = False
        self._complete = training.complete_rows
        self._batches: deque[tuple[int, torch.Tensor]] = deque(maxlen=-(-_ROWS // self._complete))

    def note(self, training: Training) -> None:
        """Keep the dense columns of a step's batch if it is complete; called after each step."""
        batch = training.batch
        if batch is not None and batch.global_rows >= self._complete:
            self._batches.append((training.step, batch.dense[: batch.num_rows]))

    def __call__(self) -> str | None:
        """Check, and return a warning the first time that the output does not vary. A collective call."""
        if self._dense_arch is None or not self._batches:
            return None
        steps, batches = zip(*self._batches, strict=True)
        rows = torch.cat(batches)
        with torch.no_grad():
            # By forward, because the module itself may be compiled for training batches.
            found = [_extremes(rows), _extremes(self._dense_arch.forward(rows))]
        extremes = torch.cat(found, dim=1)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        highest, lowest = extremes[0], -extremes[1]
        ranges, columns = highest - lowest, rows.shape[1]
        if not (ranges[:columns] > 0).any():
            return None
        sizes = torch.maximum(highest.abs(), lowest.abs())
        self.varies = bool((ranges > _SAME * sizes)[columns:].any())
        if self.varies or self._warned:
            return None
        self._warned = True
        of_steps = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        return (
            f"the output of the dense arch is the same for all {len(steps) * self._complete:,} rows of "
            f"{of_steps}, so the model ignores its dense columns: {_ADVICE}"
        )


def _dense_arch(model: nn.Module) -> DenseArch | None:
    return next((module for module in model.modules() if isinstance(module, DenseArch)), None)


def _extremes(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each column and of its negative, ``(2, columns)``; -inf without rows."""
    if not len(values):
        return torch.full((2, values.shape[1]), -math.inf, device=values.device)
    return torch.stack([values.amax(dim=0), (-values).amax(dim=0)])
