"""Whether two models differ on the same rows by more than another sample of rows would show: a paired bootstrap."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlet_dist.quality.score_metrics import Floats, RankedRows, Scores, auc, logloss, row_losses

REPLICATES = 1000
CONFIDENCE = 0.95
MAX_ROWS = 1 << 20
_FLOATS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between two models, and where it would be for other rows.

    Attributes:
        value: the metric of the first model minus that of the second.
        low: the lower end of the interval.
        high: the upper end. All are NaN where the metric is undefined.
    """

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval contains zero, or is undefined."""
        return not (self.low > 0 or self.high < 0)


def paired_differences(
    first: Scores,
    second: Scores,
    *,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> dict[str, Difference]:
    """Return the differences of ``auc`` and ``logloss`` between two models, each with its bootstrap interval.

    Each replicate counts every row a Poisson(1) number of times, the same for both models, so that what both find hard
    cancels. The interval is between the quantiles of the replicates' differences. It says what other rows of the same
    kind would give; training with another seed is not in it.

    Args:
        first: of one model.
        second: of the other one, for the same rows in the same order.
        replicates: their number.
        confidence: the share of intervals that contain the true difference.
        seed: of the replicates.
        max_rows: of more rows, that many are drawn for the replicates, whose differences then shrink by
            ``sqrt(max_rows / N)`` towards that of all rows.

    Raises:
        ValueError: the two have other rows: their labels or weights differ.
    """
    if len(first) != len(second):
        raise ValueError(f"the models scored {len(first):,} and {len(second):,} rows; score the same rows with both")
    for name, ours, theirs in (
        ("label", first.labels, second.labels),
        ("weight", first.weights, second.weights),
    ):
        if not np.array_equal(ours, theirs):
            row = int(np.argmin(ours == theirs))
            raise ValueError(
                f"row {row} has {name} {ours[row]:g} for one model and {theirs[row]:g} for the other; score the same "
                "rows with both"
            )
    values = {"auc": auc(first) - auc(second), "logloss": logloss(first) - logloss(second)}
    generator = np.random.default_rng(seed)
    shrinks = 1.0
    if len(first) > max_rows:
        shrinks = np.sqrt(max_rows / len(first))
        rows = generator.choice(len(first), max_rows, replace=False)
        first, second = (Scores(each.logits[rows], each.labels[rows], each.weights[rows]) for each in (first, second))
    drawn = _drawn_differences(first, second, replicates, generator)
    centres = {"auc": auc(first) - auc(second), "logloss": logloss(first) - logloss(second)}
    tail = (1 - confidence) / 2
    found = {}
    for name, value in values.items():
        moved = drawn[name][~np.isnan(drawn[name])] - centres[name]  # a replicate of few rows may have one label alone
        low, high = np.quantile(moved, [tail, 1 - tail]) * shrinks if len(moved) else (np.nan, np.nan)
        found[name] = Difference(value, value + float(low), value + float(high))
    return found


def _drawn_differences(
    first: Scores, second: Scores, replicates: int, generator: np.random.Generator
) -> dict[str, Floats]:
    """Return the differences of ``auc`` and ``logloss`` of each replicate, ``(replicates,)``."""
    ranked = RankedRows.of(first), RankedRows.of(second)
    losses = row_losses(first) - row_losses(second)
    aucs, means = [], []
    for weights in _replicate_weights(first.weights, replicates, generator):
        aucs.append(ranked[0].auc(weights) - ranked[1].auc(weights))
        with np.errstate(invalid="ignore"):
            means.append(weights @ losses / weights.sum(axis=1))
    return {"auc": np.concatenate(aucs), "logloss": np.concatenate(means)}


def _replicate_weights(weights: Floats, replicates: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Yield the weights of some replicates at a time, ``(S, N)``."""
    at_once = max(1, _FLOATS_AT_ONCE // max(1, len(weights)))
    for start in range(0, replicates, at_once):
        shape = min(at_once, replicates - start), len(weights)
        yield generator.poisson(1.0, shape) * weights
