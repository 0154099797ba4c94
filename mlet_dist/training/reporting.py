"""Reports of a run while it trains: the progress line, metrics.jsonl, TensorBoard and other trackers."""

import errno
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.progress import Progress
from mlet_dist.training.dense_arch_check import DenseArchCheck
from mlet_dist.training.label_metrics import metric_prefixes
from mlet_dist.training.metrics_endpoint import MetricsEndpoint
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import learning_rate_factor
from mlet_dist.training.state import Training
from mlet_dist.training.timing import StepTimer
from mlet_dist.training.trackers import Trackers


class Recorder:
    """Writes the records of a run to metrics.jsonl and TensorBoard, on rank 0; on other ranks it does nothing.

    Args:
        run: the run directory.
        enabled: whether this is rank 0.
        step, size: the position to resume from, as in ``roll_back``.
        endpoint: shows the records to Prometheus, too; closed with the recorder.
        tensorboard: whether to write TensorBoard's files.
        trackers: other trackers, which read metrics.jsonl; started and closed with the recorder.
    """

    def __init__(
        self,
        run: RunDirectory,
        enabled: bool,
        step: int = 0,
        size: int = 0,
        endpoint: MetricsEndpoint | None = None,
        *,
        tensorboard: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        self._run, self._enabled, self._endpoint = run, enabled, endpoint
        self._with_tensorboard, self._trackers = tensorboard, trackers
        self._tensorboard: SummaryWriter | None = None
        self._open(step, size)
        if trackers is not None:
            trackers.start()

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl. Checkpoints save it, so that a resumed run records each step once."""
        return self._lines.tell() if self._enabled else 0

    def record(self, split: str, step: int, values: Mapping[str, float | str | Sequence[float]]) -> None:
        """Write one line, and to TensorBoard a scalar for each number and a histogram for each list, as ``split/name``.

        Raises:
            UserError: they cannot be written.
        """
        if not self._enabled:
            return
        line = (to_json({"step": step, "split": split, **values}) + "\n").encode()
        with self._writing():
            if self._lines.write(line) < len(line):
                raise OSError(errno.ENOSPC, "the disk is full")
            if self._tensorboard is not None:
                _show(self._tensorboard, split, step, values)
        if self._endpoint is not None:
            self._endpoint.record(split, step, values)
        if self._trackers is not None:
            self._trackers.notice()

    def saved(self, step: int) -> None:
        """Show Prometheus that the checkpoint of a step is complete."""
        if self._endpoint is not None:
            self._endpoint.saved(step)

    def roll_back(self, step: int, size: int) -> None:
        """Truncate metrics.jsonl to ``size`` bytes and drop TensorBoard's records after ``step``."""
        self._close()
        self._open(step, size)
        if self._trackers is not None:
            self._trackers.roll_back(step, size)

    def _open(self, step: int, size: int) -> None:
        if not self._enabled:
            return
        with self._writing():
            metrics = self._run.metrics
            kept = metrics.read_bytes()[:size] if metrics.exists() else b""
            self._lines = metrics.open("ab", buffering=0)
            self._lines.truncate(kept.rfind(b"\n") + 1)  # a machine that crashed may have lost the end
            self._lines.seek(0, 2)
            # TensorBoard ignores these steps in older files.
            if self._with_tensorboard:
                self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=step + 1)

    def _close(self) -> None:
        if self._enabled:
            with self._writing():
                self._lines.close()
                if self._tensorboard is not None:
                    self._tensorboard.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"run.dir {self._run.path}: metrics cannot be written: {error.strerror or error}"
            raise UserError(message) from None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        try:
            self._close()
        except UserError:
            if error is None:  # an earlier error explains more
                raise
        finally:
            if self._trackers is not None:
                self._trackers.close(error)


def _show(
    tensorboard: SummaryWriter, split: str, step: int, values: Mapping[str, float | str | Sequence[float]]
) -> None:
    for name, value in values.items():
        if isinstance(value, float | int):
            if not math.isnan(value):  # undefined, such as the AUC of rows of one class
                tensorboard.add_scalar(f"{split}/{name}", value, step)
        elif not isinstance(value, str):
            tensorboard.add_histogram(f"{split}/{name}", np.array(value), step)


_SHOWN_DATA_WAIT = 0.1  # share of a step


class TrainingReport:
    """Reports every ``log_every`` steps: loss since the last report, AUC of the run, throughput of this job.

    It also reports before each validation, whose metrics then have those of training beside them.

    Args:
        config: the resolved settings.
        training: the state that this job starts from.
        progress: the bar or lines on stderr.
        recorder: metrics.jsonl and TensorBoard.
        guard: flushed before anything is reported.
        timer: the times of the steps since the last report.
        labels: the names of the labels.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        progress: Progress,
        recorder: Recorder,
        guard: Guard,
        timer: StepTimer,
        labels: Sequence[str] = ("label",),
    ) -> None:
        self._config, self._progress, self._recorder = config, progress, recorder
        self._guard, self._timer = guard, timer
        self._factor = learning_rate_factor(config.optimizer, training.steps)
        self._first_step = self._shown_step = training.step
        self._started = time.monotonic()
        self._prefixes = metric_prefixes(labels)
        self._reported = {f"{prefix}{name}": 0.0 for prefix in self._prefixes for name in ("rows", "loss_sum")}
        self._waits_for_data = False
        self._dense_arch = DenseArchCheck(training)

    def state_dict(self) -> dict[str, float]:
        """Return the totals, of each label, that the loss since the last report is computed from."""
        return dict(self._reported)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from another job's totals."""
        self._reported = {name: state[name] for name in self._reported}

    def __call__(self, training: Training) -> None:
        """Report a step; called after each step.

        Raises:
            NonFinite: a loss or gradient is not finite.
        """
        step, fields = training.step, {}
        if self._guard.skip_reason is not None:
            self._report_skipped(training, self._guard.skip_reason)
        self._dense_arch.note(training)
        if step % self._config.train.log_every == 0 or training.is_done or training.needs_validation:
            self._guard.flush()
            warning = self._dense_arch()
            if warning is not None:
                self._progress.log(f"warning: {warning}")
            values, timing = self._values(training), self._timer.report()
            undefined = any(math.isnan(values[f"{prefix}auc"]) for prefix in self._prefixes)
            if training.is_done and undefined and training.updates:
                self._progress.log(
                    "warning: the rows that were trained on all have the same label, or a sample_weight of 0, so the "
                    "model learned nothing from them; look at the label column and at sample_weight"
                )
            self._recorder.record("train", step, values)
            self._recorder.record("timing", step, timing)
            fields = {
                "loss": shown_metric(values["loss"]),
                **{f"{prefix.replace('_', ' ')}AUC": shown_metric(values[f"{prefix}auc"]) for prefix in self._prefixes},
                "samples/s": f"{values['samples_per_s']:,.0f}",
            }
            share = timing["data_wait_ms"] / timing["step_ms"]
            self._waits_for_data |= share > _SHOWN_DATA_WAIT
            if self._waits_for_data:
                fields["data wait"] = f"{share:.0%}"
        self._progress.update(step - self._shown_step, found=False, **fields)
        self._shown_step = step

    def log(self, line: str) -> None:
        """Show a line beside the progress of training."""
        self._progress.log(line)

    def exclude(self, seconds: float) -> None:
        """Leave the last ``seconds``, in which no step was taken, out of all rates and times."""
        self._started += seconds
        self._timer.exclude(seconds)

    def roll_back(self, training: Training, finding: Finding, state: dict[str, Any]) -> None:
        """Continue after a rollback; ``state`` is that of ``state_dict`` in the checkpoint."""
        self.load_state_dict(state)
        # The records of earlier rollbacks to this step were dropped with the step, so all of them are written again.
        for count, step in enumerate(sorted(training.excluded_steps), start=1):
            if step > training.step:
                self._recorder.record("rollback", training.step, {"batch_of_step": step, "rollbacks": count})
        self._progress.log(f"warning: {finding}; rolled back to step {training.step}, continuing without that batch")

    def summary(self, training: Training) -> dict[str, Any]:
        """Return what the run's summary says about this job's steps."""
        return {
            "samples_per_s": self._samples_per_s(training),
            "train_rows": training.rows,
            "skipped_batches": training.skipped,
            "rollbacks": len(training.excluded_steps),
            "dense_arch_varies": self._dense_arch.varies,
            "timing": self._timer.summary(),
        }

    def _report_skipped(self, training: Training, finding: Finding) -> None:
        values = {"skipped_batches": training.skipped}
        if finding.rank is not None:
            values["rank"] = finding.rank
        self._recorder.record("skipped", training.step, values)
        self._progress.log(f"warning: {finding}; the batch was skipped, {training.skipped} so far")

    def _values(self, training: Training) -> dict[str, float]:
        totals, values = training.metrics.compute(), {}
        for prefix in self._prefixes:
            before, before_sum = self._reported[f"{prefix}rows"], self._reported[f"{prefix}loss_sum"]
            rows = totals.get(f"{prefix}weight", totals[f"{prefix}rows"])  # a row of weight 2 counts as two
            loss_sum = totals[f"{prefix}logloss"] * rows if rows else 0.0
            values[f"{prefix}loss"] = (loss_sum - before_sum) / (rows - before) if rows > before else math.nan
            values[f"{prefix}auc"] = totals[f"{prefix}auc"]
            self._reported |= {f"{prefix}rows": rows, f"{prefix}loss_sum": loss_sum}
        if len(self._prefixes) > 1:  # the sum that is trained, of the labels that the rows have
            losses = [values[f"{prefix}loss"] for prefix in self._prefixes]
            parts = [weight * loss for weight, loss in zip(training.label_weights, losses, strict=True) if weight]
            values["loss"] = sum(part for part in parts if not math.isnan(part)) if any(parts) else math.nan
        return {
            **values,
            "samples_per_s": self._samples_per_s(training),
            "learning_rate": self._config.optimizer.learning_rate * self._factor(training.updates - 1),
        }

    def _samples_per_s(self, training: Training) -> float:
        rows = training.rows - training.rows_by(self._first_step)
        return rows / (time.monotonic() - self._started)


def shown_metric(value: float) -> str:
    """Return a loss or AUC as text; NaN is one that no row of weight above 0, or no row of one class, defines."""
    return "undefined" if math.isnan(value) else f"{value:.4f}"
