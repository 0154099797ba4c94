"""What is said of training every few steps."""

import math
import time
from typing import Any

from mlet_dist.config.sections import Config
from mlet_dist.progress import Progress
from mlet_dist.training.guard import Finding, Guard
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.schedule import learning_rate_factor
from mlet_dist.training.state import Training
from mlet_dist.training.timing import StepTimer

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
