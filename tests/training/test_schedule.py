"""Learning rates as a function of the step."""

import math
from typing import Any

import pytest

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.training.schedule import learning_rate_factor, schedule_warnings


def factors(steps: int, **settings: object) -> list[float]:
    factor = learning_rate_factor(OptimizerConfig(**settings), steps)  # type: ignore[arg-type]
    return [factor(done) for done in range(steps + 1)]


def test_without_settings_the_rate_stays() -> None:
    assert factors(3) == [1.0, 1.0, 1.0, 1.0]


def test_warmup_rises_from_its_first_step_to_its_last() -> None:
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert factors(2, warmup_steps=4) == [0.25, 0.5, 0.75]


def test_linear_decay_begins_after_warmup_or_at_decay_start_and_ends_with_the_run() -> None:
    assert factors(6, warmup_steps=2, decay="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(6, warmup_steps=1, decay="linear", decay_start=4) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert factors(4, decay="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_decay_is_half_way_at_half_of_the_factor() -> None:
    found = factors(8, warmup_steps=4, decay="cosine")
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[6] == pytest.approx(0.5)
    assert found[5] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found[8] == 0.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_run_that_ends_before_its_decay_keeps_the_full_rate(decay: str) -> None:
    assert factors(3, decay=decay, decay_start=3) == [1.0, 1.0, 1.0, 1.0]
    assert factors(3, decay=decay, decay_start=10) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({"warmup_steps": 99}, []),
        ({"warmup_steps": 100}, ["optimizer.warmup_steps 100: the warm-up does not end within the run's 100 steps"]),
        ({"decay": "linear", "decay_start": 99}, []),
        (
            {"decay": "linear", "decay_start": 100},
            ["optimizer.decay_start 100 is not reached within the run's 100 steps"],
        ),
    ],
)
def test_a_run_too_short_for_its_schedule_warns(settings: dict[str, Any], warnings: list[str]) -> None:
    assert schedule_warnings(OptimizerConfig(**settings), 100) == warnings
