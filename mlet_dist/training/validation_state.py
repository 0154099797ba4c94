"""What the validations of a run have found so far, which decides on its best checkpoint and on early stopping."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VALIDATION = "validation"
"""The key under which the manifest of a checkpoint holds ``ValidationState.to_dict``."""


@dataclass
class ValidationState:
    """The findings of all validations. A checkpoint holds them, so that a resumed run goes on from them.

    Attributes:
        step: of the last validation; 0 before the first.
        metrics: what it measured.
        metric: the metric by which the best step is chosen, as ``auc`` or ``click_logloss``; None if none is chosen.
        share: of the rows of the split that were measured.
        best_step: of the best validation; None before the first, and where the metric was undefined in all of them.
        best_value: its metric.
        worse: validations since then.
    """

    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    metric: str | None = None
    share: float = 1.0
    best_step: int | None = None
    best_value: float | None = None
    worse: int = 0

    @classmethod
    def from_dict(cls, state: Mapping[str, Any] | None) -> "ValidationState":
        """Return the state that ``to_dict`` returned; that of a new run for None."""
        if state is None:
            return cls()
        metrics = {name: math.nan if value is None else value for name, value in state["metrics"].items()}
        return cls(**{**state, "metrics": metrics})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; JSON has null for a metric that is undefined."""
        return dataclasses.asdict(self)

    def choose_by(self, metric: str | None, share: float) -> int | None:
        """Compare by this metric of this share of the rows from now on.

        Returns:
            The best step so far if it is forgotten, because it was chosen by another metric or share.
        """
        forgotten = None
        if (self.metric, self.share) != (metric, share):
            forgotten, self.best_step, self.best_value, self.worse = self.best_step, None, None, 0
            self.metric, self.share = metric, share
        return forgotten

    def note(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note a validation; return whether it is the best so far. An undefined metric is not."""
        self.step, self.metrics = step, dict(metrics)
        if self.metric is None:
            return False
        value = metrics[self.metric]
        if self._is_best(value):
            self.best_step, self.best_value, self.worse = step, value, 0
            return True
        self.worse += 1
        return False

    def _is_best(self, value: float) -> bool:
        if math.isnan(value) or self.metric is None:
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if self.metric.endswith("auc") else value < self.best_value


def better_step(run: object, summary: Mapping[str, Any]) -> str | None:
    """Return a sentence, without its full stop, if a run had a better step than its last; None if it had none.

    Args:
        run: the run's directory.
        summary: what its summary holds.
    """
    if summary.get("best_step") is None or summary["last_is_best"]:
        return None
    return (
        f"{run}: step {summary['best_step']:,} was better than the last step, {summary['steps']:,}, with a "
        f"{summary['best_metric']} of {summary['best_value']:.4f}, and its checkpoint is kept"
    )
