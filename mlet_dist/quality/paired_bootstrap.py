"""Whether two models differ by more than other rows and other seeds would show: a paired bootstrap."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlet_dist.quality.replicates import MAX_ROWS, METRICS, REPLICATES, Replicates, replicates_of
from mlet_dist.quality.score_metrics import Floats, Scores

CONFIDENCE = 0.95
_DRAWS_A_PART = 1001


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
    """Return the differences of ``auc`` and ``logloss`` between two models, each with its interval.

    The interval is between the quantiles of the replicates' differences (``replicates_of``). It says what other rows of
    the same kind would give; training with another seed is not in it.

    Args:
        first: of one model.
        second: of the other one, for the same rows in the same order.
        replicates: their number.
        confidence: the share of intervals that contain the true difference.
        seed: of the replicates.
        max_rows: as in ``replicates_of``.

    Raises:
        ValueError: the two have other rows: their labels or weights differ.
    """
    found = replicates_of([first, second], replicates=replicates, seed=seed, max_rows=max_rows)
    return {
        name: difference_of(found[name].draws[:, 0] - found[name].draws[:, 1],
                            float(found[name].values[0] - found[name].values[1]), confidence)
        for name in METRICS
    }  # fmt: skip


def difference_of(draws: Floats, value: float, confidence: float = CONFIDENCE) -> Difference:
    """Return a difference with the interval between the quantiles of its draws ``(R,)``."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Difference(value, float(low), float(high))


def difference_over_seeds(
    metric: Replicates, first: Sequence[int], second: Sequence[int], generator: np.random.Generator
) -> tuple[float, Floats]:
    """Return the mean difference of pairs of models with the same seeds, and its draws ``(R,)``, of rows and of seeds.

    Args:
        metric: of all models.
        first: positions in it of one arm's models.
        second: those of the other arm's, in the order of the same seeds.
        generator: as in ``seed_noise``.
    """
    differences = metric.values[list(first)] - metric.values[list(second)]
    rows: Floats = (metric.draws[:, list(first)] - metric.draws[:, list(second)]).mean(axis=1)
    return float(differences.mean()), rows + seed_noise(list(differences), len(rows), generator)


def seed_noise(values: Sequence[float], replicates: int, generator: np.random.Generator) -> Floats:
    """Return draws of how far the mean over seeds may be from the mean over all seeds, ``(R,)``: Student's t.

    Args:
        values: of each seed; of one alone there is nothing to estimate the spread of seeds from, and the draws are 0.
        replicates: R.
        generator: of the order of the draws.
    """
    if len(values) < 2:
        return np.zeros(replicates)
    spread = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return spread * generator.permutation(_student_t(len(values) - 1, replicates))


@functools.cache
def _student_t(degrees: int, replicates: int) -> Floats:
    """Return quantiles of Student's t in the middle of R parts of equal probability, ``(R,)`` ascending.

    Of a few degrees of freedom, R independent draws would have tails that are a matter of luck.
    """
    draws = np.sort(np.random.default_rng(0).standard_t(degrees, (_DRAWS_A_PART, replicates)), axis=None)
    middle = draws.reshape(replicates, _DRAWS_A_PART)[:, _DRAWS_A_PART // 2]
    found: Floats = (middle - middle[::-1]) / 2
    return found
