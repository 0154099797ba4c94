"""The state that changes with every step of training, and that a checkpoint therefore holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mlet_dist.config.sections import Precision
from mlet_dist.data.loading.loader import Batch
from mlet_dist.training.evaluation import BinaryMetrics


@dataclass
class Training:
    """The state of a run between two steps.

    Attributes:
        model: the sharded model.
        optimizer: the optimizer of all its parameters.
        metrics: metrics of all rows trained on.
        steps: the number of steps of the whole run.
        batches_per_epoch: global batches in one pass over the data; the last one may be incomplete.
        batch_size: rows of a complete global batch.
        rows_per_epoch: rows of one pass over the data.
        step: steps taken, by this job and those before it; batch ``step``, counted over all epochs, comes next.
        skipped: steps whose batch was skipped; the learning rates advance with the other steps alone.
        excluded_steps: steps whose batch is skipped whatever it holds, because the run was rolled back because of it.
        precision: in which the dense layers and W2 compute (``dense_arithmetic``).
        batch: this rank's batch of the last step that this job took, on the model's device; not part of checkpoints.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    metrics: BinaryMetrics
    steps: int
    batches_per_epoch: int
    batch_size: int
    rows_per_epoch: int
    step: int = 0
    skipped: int = 0
    excluded_steps: set[int] = field(default_factory=set)
    precision: Precision = "fp32"
    batch: Batch | None = None

    @property
    def complete_rows(self) -> int:
        """Rows of a complete global batch; of the only batch, if the data has fewer."""
        return min(self.batch_size, self.rows_per_epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self.step // self.batches_per_epoch

    @property
    def batch_in_epoch(self) -> int:
        """The next batch's position in its epoch, from 0."""
        return self.step % self.batches_per_epoch

    @property
    def rows(self) -> int:
        """Rows of the batches of all steps taken, counted once for each epoch."""
        return self.rows_by(self.step)

    def rows_by(self, step: int) -> int:
        """Return the rows of the batches of the first ``step`` steps."""
        epochs, batches = divmod(step, self.batches_per_epoch)
        return epochs * self.rows_per_epoch + batches * self.batch_size

    @property
    def updates(self) -> int:
        """Steps that updated weights: the position in the learning rate schedule."""
        return self.step - self.skipped

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


AfterStep = Callable[[Training], None]
"""Called after each step by all ranks, in the same order, so that it may call collectives."""
