"""The replicates of many models are those of a bootstrap that counts every pair of rows anew."""

import numpy as np
import pytest

from mlet_dist.quality.replicates import replicates_of
from mlet_dist.quality.score_metrics import RankedRows, Scores, auc, logloss


def models(rows: int, *, ties: bool = False, weighted: bool = False) -> list[Scores]:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=rows)
    labels = generator.random(rows) < 1 / (1 + np.exp(-truth))
    weights = generator.integers(0, 4, rows) if weighted else None
    found = [truth + noise * generator.normal(size=rows) for noise in (0.2, 0.5, 1.0)]
    return [Scores.of(np.round(each) if ties else each, labels, weights) for each in found]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_influence_of_a_row_on_auc_is_its_derivative(ties: bool, weighted: bool) -> None:
    scores = models(60, ties=ties, weighted=weighted)[1]
    ranked, step = RankedRows.of(scores), 1e-6
    found = ranked.auc_influences(scores.weights)
    more = scores.weights * (1 + step * np.eye(len(scores)))
    less = scores.weights * (1 - step * np.eye(len(scores)))
    derivative = [(ranked.auc(a) - ranked.auc(b)) / (2 * step) for a, b in zip(more, less, strict=True)]
    np.testing.assert_allclose(found, derivative, atol=1e-8)
    assert abs(found.sum()) < 1e-12  # more of all rows is the same


def test_draws_are_those_of_rows_that_are_counted_anew() -> None:
    own = models(4000, weighted=True)
    found = replicates_of(iter(own), replicates=50, seed=3)
    counts = np.random.default_rng(3).poisson(1.0, (50, 4000))
    for index, scores in enumerate(own):
        assert found["auc"].values[index] == auc(scores)
        assert found["logloss"].values[index] == logloss(scores)
        ranked = RankedRows.of(scores)
        exact = np.array([ranked.auc(each * scores.weights) for each in counts])
        moved = exact - auc(scores)
        # To first order: what is left is smaller by 1/sqrt(N).
        left = 10 / np.sqrt(4000)
        assert np.abs(found["auc"].draws[:, index] - exact).max() < left * moved.std()
        losses = [logloss(Scores(scores.logits, scores.labels, each * scores.weights)) for each in counts]
        assert np.abs(found["logloss"].draws[:, index] - losses).max() < left * np.std(losses)


def test_the_same_rows_are_drawn_for_all_models() -> None:
    own = models(500)
    alone = replicates_of(own[:1], replicates=20)
    beside = replicates_of([own[2], own[0]], replicates=20)
    np.testing.assert_allclose(beside["auc"].draws[:, 1], alone["auc"].draws[:, 0], rtol=1e-12)


def test_rows_of_one_label_have_no_auc() -> None:
    found = replicates_of([Scores.of([0.1, 0.2], [1, 1])], replicates=5)
    assert np.isnan(found["auc"].draws).all()
    assert np.isfinite(found["logloss"].draws).all()
