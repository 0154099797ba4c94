"""The best step so far, by metric, and how many validations since then were not better."""

import json
import math

import pytest

from mlet_dist.formatting import to_json
from mlet_dist.training.validation_state import ValidationState, better_step


@pytest.mark.parametrize(
    ("metric", "values", "best", "worse"),
    [
        ("auc", [0.6, 0.7, 0.7, 0.65], 2, 2),
        ("logloss", [0.6, 0.7, 0.5, 0.5, 0.55], 3, 2),
        ("logloss", [math.nan, 0.7, math.nan], 2, 1),
        ("auc", [math.nan, math.nan], None, 2),
        (None, [0.5, 0.4], None, 0),
    ],
)
def test_equal_and_undefined_values_are_not_better(
    metric: str | None, values: list[float], best: int | None, worse: int
) -> None:
    state = ValidationState()
    assert state.choose_by(metric, 1.0) is None
    for step, value in enumerate(values, start=1):
        assert state.note(step, {"auc": value, "logloss": value}) == (state.best_step == step)
    assert (state.best_step, state.worse, state.step) == (best, worse, len(values))
    assert state.best_value == (None if best is None else values[best - 1])


def test_a_checkpoint_keeps_all_of_it() -> None:
    state = ValidationState()
    state.choose_by("logloss", 0.25)
    state.note(7, {"auc": math.nan, "logloss": 0.1 + 0.2, "rows": 9})
    found = ValidationState.from_dict(json.loads(to_json(state.to_dict())))
    assert math.isnan(found.metrics.pop("auc"))
    state.metrics.pop("auc")
    assert found == state
    assert ValidationState.from_dict(None) == ValidationState()


def test_another_metric_or_share_forgets_the_best_step() -> None:
    state = ValidationState()
    state.choose_by("auc", 1.0)
    state.note(5, {"auc": 0.7})
    assert state.choose_by("auc", 1.0) is None
    assert state.choose_by("auc", 0.5) == 5
    assert (state.best_step, state.best_value, state.step) == (None, None, 5)


def test_a_better_step_is_told_only_of_a_run_that_has_one() -> None:
    summary = {"steps": 90, "best_step": 30, "last_is_best": False, "best_metric": "valid auc", "best_value": 0.71}
    expected = "r: step 30 was better than the last step, 90, with a valid auc of 0.7100, and its checkpoint is kept"
    assert better_step("r", summary) == expected
    for change in ({"last_is_best": True}, {"best_step": None}):
        assert better_step("r", summary | change) is None
    assert better_step("r", {}) is None
