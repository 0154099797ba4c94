"""The state that changes with every step of training, and that a checkpoint therefore holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mlet_dist.config.sections import Precision
from mlet_dist.data.loading.loader import Batch
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.label_metrics import LabelMetrics
from mlet_dist.training.nested_loss import NestedLoss
from mlet_dist.training.validation_state import ValidationState


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
        validate_every: steps between two validations; None if there are none. One more follows the last step.
        patience: how many validations that are not the best so far, one after the other, stop the run; None for any.
        validation: what the validations have found.
        precision: in which the dense layers and W2 compute (``dense_arithmetic``).
        label_weights: the factor of each label's loss.
        nested: of a model that is trained at several widths; None for one that is not.
        batch: this rank's batch of the last step that this job took, on the model's device; not part of checkpoints.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    metrics: BinaryMetrics | LabelMetrics
    steps: int
    batches_per_epoch: int
    batch_size: int
    rows_per_epoch: int
    step: int = 0
    skipped: int = 0
    excluded_steps: set[int] = field(default_factory=set)
    validate_every: int | None = None
    patience: int | None = None
    validation: ValidationState = field(default_factory=ValidationState)
    precision: Precision = "fp32"
    label_weights: tuple[float, ...] = (1.0,)
    batch: Batch | None = None
    nested: NestedLoss | None = None

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
        return self.step >= self.steps or self.stops_early

    @property
    def stops_early(self) -> bool:
        """Whether the last validations were so many that were not the best that the run takes no more steps."""
        return self.patience is not None and self.validation.worse >= self.patience

    @property
    def needs_validation(self) -> bool:
        """Whether a validation is due after the last step taken, and has not been done."""
        if self.validate_every is None or self.step <= self.validation.step:
            return False
        return self.step % self.validate_every == 0 or self.step >= self.steps

    @property
    def steps_to_validation(self) -> int:
        """The number of steps that come before the next validation, or before the end of the run."""
        left = max(0, self.steps - self.step)
        if self.validate_every is None:
            return left
        return min(left, self.validate_every - self.step % self.validate_every)


AfterStep = Callable[[Training], None]
"""Called after each step by all ranks, in the same order, so that it may call collectives."""
