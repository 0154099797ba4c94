"""AUC, LogLoss and calibration are those of scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from mlet_dist.quality.calibration import (
    ReliabilityBin,
    calibration,
    mean_bins,
    normalised_entropy,
    probabilities,
    reliability,
)
from mlet_dist.quality.paired_bootstrap import seed_noise
from mlet_dist.quality.score_metrics import Scores, auc, logloss


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_are_those_of_scikit_learn(ties: bool, weighted: bool) -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(-1, 1.5, 3000)
    logits = np.round(logits, 1) if ties else logits
    labels = (generator.random(3000) < 1 / (1 + np.exp(-logits))).astype(int)
    weights = generator.exponential(size=3000) if weighted else None
    scores = Scores.of(logits, labels, weights)
    assert auc(scores) == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights), abs=1e-12)
    expected = log_loss(labels, probabilities(scores), sample_weight=weights)
    assert logloss(scores) == pytest.approx(expected, abs=1e-12)
    rate = np.average(labels, weights=weights)
    constant = log_loss(labels, np.full(3000, rate), sample_weight=weights)
    assert normalised_entropy(scores) == pytest.approx(expected / constant, abs=1e-12)
    assert calibration(scores) == pytest.approx(np.average(probabilities(scores), weights=weights) / rate, abs=1e-12)


def test_bins_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(size=1000)
    labels = (generator.random(1000) < 0.3).astype(int)
    scores = Scores.of(logits, labels)
    observed, predicted = calibration_curve(labels, probabilities(scores), n_bins=10, strategy="quantile")
    found = reliability(scores)
    np.testing.assert_allclose([each.predicted for each in found], predicted, atol=2e-3)  # quantiles split a bin's edge
    np.testing.assert_allclose([each.observed for each in found], observed, atol=2e-2)
    assert sum(each.weight for each in found) == 1000


def test_bins_of_several_models_are_averaged() -> None:
    models = [[ReliabilityBin(0.1, 0.2, 5), ReliabilityBin(0.5, 0.4, 5)], [ReliabilityBin(0.3, 0.4, 5)] * 2]
    found = [(each.predicted, each.observed, each.weight) for each in mean_bins(models)]
    assert found == [pytest.approx((0.2, 0.3, 5)), pytest.approx((0.4, 0.4, 5))]
    assert mean_bins([]) == []


def test_metrics_without_one_of_the_labels_are_undefined() -> None:
    scores = Scores.of([0.5, -0.5], [0, 0])
    assert np.isnan(normalised_entropy(scores))
    assert not np.isfinite(calibration(scores))
    assert reliability(Scores.of([], [])) == []


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_of_other_seeds_is_that_of_scipy(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(0.01, 0.002, seeds)
    expected = stats.t.interval(0.95, seeds - 1, loc=values.mean(), scale=stats.sem(values))
    for seed in range(3):  # of the order of the draws alone
        noise = seed_noise(list(values), 1000, np.random.default_rng(seed))
        found = np.quantile(values.mean() + noise, [0.025, 0.975])
        assert found - values.mean() == pytest.approx(np.array(expected) - values.mean(), rel=0.02)
