"""Intervals contain the true difference as often as they say, and are the same whoever is named first."""

import numpy as np
import pytest

from mlet_dist.quality.paired_bootstrap import paired_differences
from mlet_dist.quality.score_metrics import Scores


def arms(rows: int, generator: np.random.Generator, *, noises: tuple[float, float] = (0.5, 0.5)) -> list[Scores]:
    """Return two models that see the same true logits, each with its own noise."""
    truth = generator.normal(size=rows)
    labels = generator.random(rows) < 1 / (1 + np.exp(-truth))
    return [Scores.of(truth + noise * generator.normal(size=rows), labels) for noise in noises]


def test_the_interval_of_two_equal_models_covers_zero_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    trials, covered = 400, {"auc": 0, "logloss": 0}
    for trial in range(trials):
        for name, each in paired_differences(*arms(300, generator), replicates=200, seed=trial, confidence=0.9).items():
            covered[name] += each.is_noise
    # Three standard deviations of a binomial with p = 0.9 are 18 of 400.
    for count in covered.values():
        assert abs(count - 0.9 * trials) < 18, covered


def test_a_drawn_part_of_the_rows_gives_intervals_of_the_same_size() -> None:
    pair = arms(40_000, np.random.default_rng(1))
    whole = paired_differences(*pair, replicates=300)
    part = paired_differences(*pair, replicates=300, max_rows=10_000)
    for name, each in whole.items():
        assert part[name].value == each.value
        assert part[name].high - part[name].low == pytest.approx(each.high - each.low, rel=0.15)


def test_a_worse_model_is_found() -> None:
    found = paired_differences(*arms(5000, np.random.default_rng(2), noises=(0.1, 1.0)))
    assert found["auc"].low > 0 > found["logloss"].high
    assert not found["auc"].is_noise


def test_names_do_not_matter() -> None:
    first, second = arms(500, np.random.default_rng(3))
    forth, back = paired_differences(first, second), paired_differences(second, first)
    for name, each in forth.items():
        assert back[name].value == -each.value
        assert (back[name].low, back[name].high) == pytest.approx((-each.high, -each.low), abs=1e-15)


def test_the_same_scores_do_not_differ() -> None:
    scores, _ = arms(100, np.random.default_rng(4))
    assert {(each.value, each.low, each.high) for each in paired_differences(scores, scores).values()} == {(0, 0, 0)}


def test_rows_of_one_label_have_no_auc_to_differ_in() -> None:
    scores = Scores.of([0.1, 0.2], [1, 1])
    found = paired_differences(scores, Scores.of([0.3, 0.1], [1, 1]))
    assert np.isnan([found["auc"].value, found["auc"].low, found["auc"].high]).all()
    assert found["auc"].is_noise
    assert found["logloss"].value == pytest.approx(
        np.mean(np.log1p(np.exp([-0.1, -0.2])) - np.log1p(np.exp([-0.3, -0.1])))
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (Scores.of([0.0, 1.0], [0, 1]), "scored 3 and 2 rows"),
        (Scores.of([0.0, 1.0, 2.0], [0, 1, 1]), "row 2 has label 0 for one model and 1 for the other"),
        (Scores.of([0.0, 1.0, 2.0], [0, 1, 0], [1, 2, 1]), "row 1 has weight 1 for one model and 2 for the other"),
    ],
)
def test_scores_of_other_rows_are_refused(changed: Scores, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_differences(Scores.of([0.0, 1.0, 2.0], [0, 1, 0]), changed)
