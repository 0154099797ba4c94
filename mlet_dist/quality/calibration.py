"""Whether predicted probabilities are those of the labels, and how much better they are than the rate of the label."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlet_dist.quality.score_metrics import Floats, Scores, logloss

BINS = 10


def probabilities(scores: Scores) -> Floats:
    """Return the predicted probability of each row, ``(N,)``."""
    with np.errstate(over="ignore"):
        found: Floats = 1 / (1 + np.exp(-scores.logits))
    return found


def normalised_entropy(scores: Scores) -> float:
    """Return LogLoss divided by that of a model that predicts the rate of the label for all rows (He et al., 2014).

    NaN unless both labels have weight.
    """
    total = scores.weights.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = (scores.weights * scores.labels).sum() / total
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(logloss(scores) / entropy)


def calibration(scores: Scores) -> float:
    """Return the sum of predicted probabilities divided by the sum of labels: 1 is best. NaN without a label of 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((scores.weights * probabilities(scores)).sum() / (scores.weights * scores.labels).sum())


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose predicted probabilities are near one another.

    Attributes:
        predicted: the mean probability.
        observed: the share of rows with a label of 1.
        weight: of the rows together.
    """

    predicted: float
    observed: float
    weight: float


def reliability(scores: Scores, bins: int = BINS) -> list[ReliabilityBin]:
    """Return bins of equal numbers of rows by rising probability; fewer than ``bins`` for fewer rows with weight."""
    predicted = probabilities(scores)
    order = np.argsort(scores.logits, kind="stable")
    found = []
    for rows in np.array_split(order[scores.weights[order] > 0], bins):
        weights = scores.weights[rows]
        if total := float(weights.sum()):
            mean = float((weights * predicted[rows]).sum()) / total
            found.append(ReliabilityBin(mean, float((weights * scores.labels[rows]).sum()) / total, total))
    return found


def mean_bins(models: Sequence[Sequence[ReliabilityBin]]) -> list[ReliabilityBin]:
    """Return the mean of each bin over models that scored the same rows; none without models."""
    return [
        ReliabilityBin(
            statistics.mean(each.predicted for each in bins),
            statistics.mean(each.observed for each in bins),
            statistics.mean(each.weight for each in bins),
        )
        for bins in zip(*models, strict=False)
    ]
