"""What changes with every step of training, and so what a checkpoint holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mlet_dist.training.evaluation import BinaryMetrics


@dataclass
class Training:
    """A run between two steps.

    Attributes:
        model: sharded.
        optimizer: of all its parameters.
        metrics: of all rows trained on.
        steps: how many the run takes in all.
        batches_per_epoch: global batches in one pass over the data.
        step: steps taken, by this job and those before it; batch ``step`` of all epochs comes next.
        skipped: those of them whose batch trained nothing; learning rates move with the others alone.
        passed_over: steps whose batch is to train nothing, whatever it holds: the run went back behind it.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    metrics: BinaryMetrics
    steps: int
    batches_per_epoch: int
    step: int = 0
    skipped: int = 0
    passed_over: set[int] = field(default_factory=set)

    @property
    def epoch(self) -> int:
        """The pass over the data that the next batch is of, from 0."""
        return self.step // self.batches_per_epoch

    @property
    def batch_in_epoch(self) -> int:
        """The next batch's number in its epoch, from 0."""
        return self.step % self.batches_per_epoch

    @property
    def updates(self) -> int:
        """Steps that moved weights: where the learning rates' schedule stands."""
        return self.step - self.skipped

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


AfterStep = Callable[[Training], None]
"""Done after each step, by all ranks, in the same order: it may call collectives."""
