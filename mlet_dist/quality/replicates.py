"""AUC and LogLoss of many models under the same drawn rows: one bootstrap from which all their differences follow."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mlet_dist.quality.score_metrics import Floats, RankedRows, Scores, auc, logloss, row_losses

REPLICATES = 1000
MAX_ROWS = 1 << 18
METRICS = ("auc", "logloss")
_FLOATS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Replicates:
    """A metric of P models for the rows that are there, and for R other draws of as many rows.

    Attributes:
        values: ``(P,)``; NaN where it is undefined.
        draws: ``(R, P)``, with the rows of a replicate the same for all models.
    """

    values: Floats
    draws: Floats


def replicates_of(
    models: Iterable[Scores], *, replicates: int = REPLICATES, seed: int = 0, max_rows: int = MAX_ROWS
) -> dict[str, Replicates]:
    """Return ``auc`` and ``logloss`` of models on the same rows, with bootstrap replicates.

    Each replicate counts every row a Poisson(1) number of times, the same for all models, so that what all of them find
    hard cancels in differences. AUC is linear in the counts here, by the influence of each row (DeLong et al., 1988).

    Args:
        models: the scores of each model, for the same rows in the same order; they are read one by one, and are not
            held in memory together.
        replicates: R.
        seed: of the replicates.
        max_rows: of more rows, that many are drawn for the replicates, which then move ``sqrt(max_rows / N)`` times as
            far from the value of all rows.

    Raises:
        ValueError: two models have other rows: their labels or weights differ.
    """
    others = iter(models)
    first = next(others)
    generator = np.random.default_rng(seed)
    shrinks, rows = 1.0, np.arange(len(first))
    if len(first) > max_rows:
        shrinks = float(np.sqrt(max_rows / len(first)))
        rows = generator.choice(len(first), max_rows, replace=False)
    of_models: dict[str, list[float]] = {name: [] for name in METRICS}
    influences = []
    for each in chain([first], others):
        _check_same_rows(first, each)
        of_models["auc"].append(auc(each))
        of_models["logloss"].append(logloss(each))
        influences.append(_influences(_rows_of(each, rows)))
    values = {name: np.array(found) for name, found in of_models.items()}
    moves = {name: np.zeros((replicates, len(influences))) for name in METRICS}
    at_once = max(1, _FLOATS_AT_ONCE // max(1, replicates))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        more = generator.poisson(1.0, (replicates, len(rows[part]))) - 1.0
        for name in METRICS:
            moves[name] += more @ np.stack([each[name][part] for each in influences], axis=1)
    return {name: Replicates(values[name], values[name] + shrinks * moves[name]) for name in METRICS}


def _check_same_rows(first: Scores, second: Scores) -> None:
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


def _rows_of(scores: Scores, rows: np.typing.NDArray[np.int64]) -> Scores:
    return Scores(scores.logits[rows], scores.labels[rows], scores.weights[rows])


def _influences(scores: Scores) -> dict[str, Floats]:
    """Return how far each metric moves, to first order, if a row is counted once more, ``(N,)``."""
    total = scores.weights.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        of_loss = scores.weights * (row_losses(scores) - logloss(scores)) / total
    return {"auc": RankedRows.of(scores).auc_influences(scores.weights), "logloss": of_loss}
