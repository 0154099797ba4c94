"""Metrics of scores are those of their definitions, computed pair by pair and with exact logarithms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mlet_dist.quality.score_metrics import Scores, auc, logloss
from mlet_dist.training.binary_metrics import BinaryMetrics


def drawn(rows: int, seed: int, *, weighted: bool = False, ties: bool = False) -> Scores:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=rows)
    labels = generator.random(rows) < 1 / (1 + np.exp(-logits))
    if ties:
        logits = np.round(logits)
    return Scores.of(logits, labels, generator.integers(0, 4, rows) if weighted else None)


def auc_of_pairs(scores: Scores) -> float:
    """Return AUC as the share of pairs of a positive and a negative in the right order."""
    wins = total = Fraction(0)
    for logit, label, weight in zip(scores.logits, scores.labels, scores.weights, strict=True):
        for other, of_other, its_weight in zip(scores.logits, scores.labels, scores.weights, strict=True):
            if label == 1 and of_other == 0:
                both = Fraction(weight) * Fraction(its_weight)
                total += both
                wins += both * (1 if logit > other else Fraction(1, 2) if logit == other else 0)
    return float(wins / total)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_in_the_right_order(weighted: bool, ties: bool) -> None:
    scores = drawn(60, 1, weighted=weighted, ties=ties)
    assert auc(scores) == pytest.approx(auc_of_pairs(scores), abs=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_metrics_of_training_are_these_up_to_their_bins(weighted: bool) -> None:
    scores = drawn(5000, 2, weighted=weighted)
    binned = BinaryMetrics(torch.device("cpu"), weighted=weighted)
    binned.update(*(torch.from_numpy(each) for each in (scores.logits, scores.labels)),
                  torch.from_numpy(scores.weights) if weighted else None)  # fmt: skip
    found = binned.compute()
    assert found["auc"] == pytest.approx(auc(scores), abs=1e-5)
    assert found["logloss"] == pytest.approx(logloss(scores), abs=1e-12)


def test_a_weight_of_two_is_two_rows() -> None:
    weighted = drawn(200, 3, weighted=True, ties=True)
    times = weighted.weights.astype(int)
    repeated = Scores.of(np.repeat(weighted.logits, times), np.repeat(weighted.labels, times))
    assert auc(weighted) == pytest.approx(auc(repeated), abs=1e-13)
    assert logloss(weighted) == pytest.approx(logloss(repeated), abs=1e-13)


def test_logits_far_from_zero_have_their_loss() -> None:
    assert logloss(Scores.of([800.0, -800.0], [0, 1])) == 800
    assert logloss(Scores.of([800.0, -800.0], [1, 0])) == 0


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_what_is_undefined_is_nan(labels: list[int]) -> None:
    scores = Scores.of([0.5] * len(labels), labels)
    assert math.isnan(auc(scores))
    assert math.isnan(logloss(scores)) == (not labels)


@pytest.mark.parametrize(
    ("logits", "labels", "weights", "message"),
    [
        ([0.0, math.nan], [0, 1], None, "row 1: the logit is nan, and must be finite"),
        ([0.0, 1.0], [0.5, 1], None, "row 0: the label is 0.5, and must be 0 or 1"),
        ([0.0, 1.0], [0, 1], [1, -1], "row 1: the weight is -1.0, and must be 0 or more"),
        ([0.0], [0, 1], None, r"logits \(1,\), labels \(2,\) and weights \(1,\)"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(
    logits: list[float], labels: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scores.of(logits, labels, weights)
