"""AUC and LogLoss of scores that are all in memory, without binning."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a model says of rows, and what is true of them.

    Attributes:
        logits: ``(N,)`` float64, finite.
        labels: ``(N,)`` float64, 0 or 1.
        weights: ``(N,)`` float64, at least 0: a row of weight 2 counts as two rows. All 1 for rows without weights.

    Raises:
        ValueError: the lengths differ, a logit is not finite, a label is neither 0 nor 1, or a weight is negative or
            not finite. The message names the row.
    """

    logits: Floats
    labels: Floats
    weights: Floats

    @classmethod
    def of(cls, logits: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> "Scores":
        """Return the scores of arrays or lists of any numeric type; without ``weights`` all rows count the same."""
        wide = np.asarray(logits, dtype=np.float64)
        given = np.ones_like(wide) if weights is None else np.asarray(weights, dtype=np.float64)
        return cls(wide, np.asarray(labels, dtype=np.float64), given)

    def __post_init__(self) -> None:
        shapes = {self.logits.shape, self.labels.shape, self.weights.shape}
        if len(shapes) > 1 or self.logits.ndim != 1:
            raise ValueError(
                f"logits {self.logits.shape}, labels {self.labels.shape} and weights {self.weights.shape}: all need "
                "one number for each row"
            )
        for valid, values, wanted in (
            (np.isfinite(self.logits), self.logits, "the logit is {}, and must be finite"),
            ((self.labels == 0) | (self.labels == 1), self.labels, "the label is {}, and must be 0 or 1"),
            ((self.weights >= 0) & (self.weights < np.inf), self.weights, "the weight is {}, and must be 0 or more"),
        ):
            if not valid.all():
                row = int(np.argmin(valid))
                raise ValueError(f"row {row}: {wanted.format(values[row])}")

    def __len__(self) -> int:
        return len(self.logits)


def auc(scores: Scores) -> float:
    """Return the area under the ROC curve, in which equal logits count half; NaN unless both labels have weight."""
    return RankedRows.of(scores).auc(scores.weights)


def row_losses(scores: Scores) -> Floats:
    """Return the negative log likelihood of each row's label in nats, ``(N,)``."""
    toward = np.where(scores.labels == 1, -scores.logits, scores.logits)
    return np.maximum(toward, 0) + np.log1p(np.exp(-np.abs(toward)))


def logloss(scores: Scores) -> float:
    """Return the weighted mean of the rows' losses; NaN if no row has weight."""
    return _mean(row_losses(scores), scores.weights)


@dataclass(frozen=True)
class RankedRows:
    """Rows in the order of their logits, of which AUC is computed with weights.

    Attributes:
        order: the rows by rising logit.
        positive: whether the label is 1, in that order.
        starts: where a new logit begins in that order.
    """

    order: npt.NDArray[np.int64]
    positive: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, scores: Scores) -> "RankedRows":
        """Sort the rows."""
        order = np.argsort(scores.logits, kind="stable")
        ranked = scores.logits[order]
        starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1]))) if len(ranked) else order
        return cls(order, scores.labels[order] == 1, starts)

    def auc(self, weights: Floats) -> float:
        """Return AUC with rows of these weights ``(N,)``; NaN where a label has no weight."""
        if not len(self.order):
            return math.nan
        ranked = weights[self.order]
        positives = np.add.reduceat(np.where(self.positive, ranked, 0.0), self.starts)
        negatives = np.add.reduceat(np.where(self.positive, 0.0, ranked), self.starts)
        below = np.cumsum(negatives) - negatives / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return float((positives * below).sum() / (positives.sum() * negatives.sum()))

    def auc_influences(self, weights: Floats) -> Floats:
        """Return the derivative of AUC by the logarithm of each row's weight, ``(N,)``, in the order of the rows.

        A row with a label of 1 contributes the share of the others that its logit is above, and one with 0 the share
        that is above it, each less AUC (DeLong et al., 1988). NaN where a label has no weight.
        """
        found = np.full(len(self.order), np.nan)
        if not len(self.order):
            return found
        ranked = weights[self.order]
        sizes = np.diff(np.append(self.starts, len(ranked)))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = []
            for of_label in (self.positive, ~self.positive):
                tied = np.add.reduceat(np.where(of_label, ranked, 0.0), self.starts)
                below = np.cumsum(tied) - tied / 2
                shares.append((np.repeat(below, sizes), tied.sum()))
            (positives_below, positives), (negatives_below, negatives) = shares
            above = np.where(self.positive, negatives_below / negatives, 1 - positives_below / positives)
            value = (ranked * above)[self.positive].sum() / positives
            found[self.order] = ranked * (above - value) / np.where(self.positive, positives, negatives)
        return found


def _mean(values: Floats, weights: Floats) -> float:
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total else math.nan
