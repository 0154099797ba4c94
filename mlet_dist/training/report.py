"""What is said of training every few steps."""

import math
import time
from typing import Any

from mlet_dist.config import Config
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.schedule import learning_rate_factor
from mlet_dist.training.state import Training


class TrainingReport:
    """Every ``log_every`` steps: loss since the last time, AUC since the run's start, speed since this job's start.

    Args:
        progress: the bar or lines on stderr.
        recorder: metrics.jsonl and TensorBoard.
        first_step: steps that the run had taken when this job began.
    """

    def __init__(self, config: Config, steps: int, progress: Progress, recorder: Recorder, first_step: int) -> None:
        self._config, self._progress, self._recorder = config, progress, recorder
        self._factor = learning_rate_factor(config.optimizer, steps)
        self._first_step = first_step
        self._started = time.monotonic()
        self._rows, self._loss_sum = 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Since this job began to train."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, float]:
        """What the loss since the last time is counted from."""
        return {"rows": self._rows, "loss_sum": self._loss_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count from where another job did."""
        self._rows, self._loss_sum = state["rows"], state["loss_sum"]

    def __call__(self, training: Training) -> None:
        """After a step.

        Raises:
            UserError: the loss is not finite.
        """
        step, fields = training.step, {}
        if step % self._config.train.log_every == 0 or training.is_done:
            found = self._values(step, training.metrics.compute())
            self._recorder.record("train", step, found)
            fields = {
                "loss": f"{found['loss']:.4f}",
                "AUC": f"{found['auc']:.4f}",
                "samples/s": f"{found['samples_per_s']:,.0f}",
            }
        self._progress.update(1, **fields)

    def _values(self, step: int, totals: dict[str, float]) -> dict[str, float]:
        rows, loss_sum = totals["rows"], totals["logloss"] * totals["rows"]
        loss = (loss_sum - self._loss_sum) / (rows - self._rows)
        self._rows, self._loss_sum = rows, loss_sum
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is {loss} by step {step}; lower optimizer.learning_rate or the initial values"
            )
        trained = (step - self._first_step) * self._config.data.batch_size
        return {
            "loss": loss,
            "auc": totals["auc"],
            "samples_per_s": trained / self.seconds,
            "learning_rate": self._config.optimizer.learning_rate * self._factor(step - 1),
        }
