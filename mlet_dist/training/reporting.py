"""What a run reports while it trains: the progress line, metrics.jsonl and TensorBoard."""

import errno
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.progress import Progress
from mlet_dist.training.guard import Finding, Guard
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import learning_rate_factor
from mlet_dist.training.state import Training
from mlet_dist.training.timing import StepTimer


class Recorder:
    """Writes records of one run, on the first rank; on the others it does nothing.

    Args:
        enabled: whether this is the first rank.
        step, size: where the run is taken up, as ``go_back``.
    """

    def __init__(self, run: RunDirectory, enabled: bool, step: int = 0, size: int = 0) -> None:
        self._run, self._enabled = run, enabled
        self._open(step, size)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl; a checkpoint keeps it, so that a run that goes on from there has each step once."""
        return self._lines.tell() if self._enabled else 0

    def record(self, split: str, step: int, values: Mapping[str, float | str | Sequence[float]]) -> None:
        """Write one line, and to TensorBoard a point a number and a histogram a list, under ``split/name``.

        Raises:
            UserError: they cannot be written.
        """
        if not self._enabled:
            return
        line = (to_json({"step": step, "split": split, **values}) + "\n").encode()
        with self._writing():
            if self._lines.write(line) < len(line):
                raise OSError(errno.ENOSPC, "the disk is full")
            for name, value in values.items():
                if isinstance(value, float | int):
                    self._tensorboard.add_scalar(f"{split}/{name}", value, step)
                elif not isinstance(value, str):
                    self._tensorboard.add_histogram(f"{split}/{name}", np.array(value), step)

    def go_back(self, step: int, size: int) -> None:
        """Drop what was recorded since there were ``size`` bytes, after ``step``; the steps that follow come again."""
        self._close()
        self._open(step, size)

    def _open(self, step: int, size: int) -> None:
        if not self._enabled:
            return
        with self._writing():
            metrics = self._run.metrics
            kept = metrics.read_bytes()[:size] if metrics.exists() else b""
            self._lines = metrics.open("ab", buffering=0)
            self._lines.truncate(kept.rfind(b"\n") + 1)  # a machine that went down may have lost the end
            self._lines.seek(0, 2)
            # TensorBoard drops what older files say of these steps.
            self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=step + 1)

    def _close(self) -> None:
        if self._enabled:
            with self._writing():
                self._lines.close()
                self._tensorboard.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"run.dir {self._run.path}: no record can be written: {error.strerror or error}"
            raise UserError(said) from None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._close()
        except UserError:
            if error is None:  # which else says more
                raise


_WORTH_SAYING = 0.1


class TrainingReport:
    """Every ``log_every`` steps: loss since the last time, AUC since the run's start, speed since this job's start.

    Args:
        training: as this job takes it up.
        progress: the bar or lines on stderr.
        recorder: metrics.jsonl and TensorBoard.
        guard: settled before anything is said.
        timer: where the time went, since the last time.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        progress: Progress,
        recorder: Recorder,
        guard: Guard,
        timer: StepTimer,
    ) -> None:
        self._config, self._progress, self._recorder = config, progress, recorder
        self._guard, self._timer = guard, timer
        self._factor = learning_rate_factor(config.optimizer, training.steps)
        self._first_step = self._shown_step = training.step
        self._started = time.monotonic()
        self._rows, self._loss_sum = 0.0, 0.0
        self._waits_for_data = False

    def state_dict(self) -> dict[str, float]:
        """What the loss since the last time is counted from."""
        return {"rows": self._rows, "loss_sum": self._loss_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count from where another job did."""
        self._rows, self._loss_sum = state["rows"], state["loss_sum"]

    def __call__(self, training: Training) -> None:
        """After a step.

        Raises:
            NonFinite: a loss or gradient is not finite.
        """
        step, fields = training.step, {}
        if self._guard.refused is not None:
            self._say_skipped(training, self._guard.refused)
        if step % self._config.train.log_every == 0 or training.is_done:
            self._guard.settle()
            found, timing = self._values(training), self._timer.report()
            self._recorder.record("train", step, found)
            self._recorder.record("timing", step, timing)
            fields = {
                "loss": f"{found['loss']:.4f}",
                "AUC": f"{found['auc']:.4f}",
                "samples/s": f"{found['samples_per_s']:,.0f}",
            }
            share = timing["data_wait_ms"] / timing["step_ms"]
            self._waits_for_data |= share > _WORTH_SAYING
            if self._waits_for_data:
                fields["data wait"] = f"{share:.0%}"
        self._progress.update(step - self._shown_step, **fields)
        self._shown_step = step

    def go_back(self, training: Training, finding: Finding, state: dict[str, Any]) -> None:
        """Training has gone back; ``state`` is that of ``state_dict`` there."""
        self.load_state_dict(state)
        # All that the run is to pass over from here on: records of earlier returns to this step are dropped with it.
        for count, step in enumerate(sorted(training.passed_over), start=1):
            if step > training.step:
                self._recorder.record("rollback", training.step, {"batch_of_step": step, "rollbacks": count})
        self._progress.say(f"warning: {finding}; back to step {training.step}, and on without that batch")

    def summary(self, training: Training) -> dict[str, Any]:
        """What a run's summary says of this job's steps."""
        return {
            "samples_per_s": self._samples_per_s(training),
            "skipped_batches": training.skipped,
            "rollbacks": len(training.passed_over),
            "timing": self._timer.summary(),
        }

    def _say_skipped(self, training: Training, finding: Finding) -> None:
        found = {"skipped_batches": training.skipped}
        if finding.rank is not None:
            found["rank"] = finding.rank
        self._recorder.record("skipped", training.step, found)
        self._progress.say(f"warning: {finding}; the batch was skipped, {training.skipped} so far")

    def _values(self, training: Training) -> dict[str, float]:
        totals = training.metrics.compute()
        rows, loss_sum = totals["rows"], totals["logloss"] * totals["rows"]
        loss = (loss_sum - self._loss_sum) / (rows - self._rows) if rows > self._rows else math.nan
        self._rows, self._loss_sum = rows, loss_sum
        return {
            "loss": loss,
            "auc": totals["auc"],
            "samples_per_s": self._samples_per_s(training),
            "learning_rate": self._config.optimizer.learning_rate * self._factor(training.updates - 1),
        }

    def _samples_per_s(self, training: Training) -> float:
        rows = (training.step - self._first_step) * self._config.data.batch_size
        return rows / (time.monotonic() - self._started)
