"""The search finds the best value of a known function, asks the same of every arm, and repeats nothing."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.errors import UserError
from mlet_dist.sweep.sweep_file import Interval, TuneConfig
from mlet_dist.sweep.trained_points import Outcome, TrainedPoints
from mlet_dist.sweep.tuning import Trial, tune

CONFIG = Path(__file__).parents[2] / "configs" / "criteo_kaggle.yaml"
TUNED = TuneConfig(
    settings={"optimizer.learning_rate": Interval(1e-4, 1.0)}, trials=12, steps=90, first_steps=10, keep=3
)


class Runs:
    """Runs whose LogLoss is a function of the rate and falls with the steps."""

    def __init__(self, loss: Callable[[float], float]) -> None:
        self.loss = loss
        self.trained: list[tuple[float, int]] = []

    def train(self, config: Config, start: Config | None = None) -> Outcome:
        rate, steps = config.optimizer.learning_rate, config.train.max_steps
        assert steps is not None
        assert start is None or start.train.max_steps == steps // 3
        self.trained.append((rate, steps))
        loss = self.loss(rate)
        if math.isnan(loss):
            return Outcome(Path("run"), {}, 1.0, "not finite at step 3")
        return Outcome(Path("run"), {"valid_logloss": loss + 1 / steps, "valid_auc": 1 - loss}, 1.0)

    def forget_checkpoints(self, config: Config) -> None:
        pass


def configured(settings: dict[str, float], steps: int) -> Config:
    config = load_config(CONFIG, ["data.path=d", "run.dir=r"])
    optimizer = dataclasses.replace(config.optimizer, learning_rate=settings["optimizer.learning_rate"])
    return dataclasses.replace(config, optimizer=optimizer, train=dataclasses.replace(config.train, max_steps=steps))


def trials_of(runs: Runs, **changes: Any) -> list[Trial]:
    shown: list[Trial] = []
    tuned = dataclasses.replace(TUNED, **changes)
    found = tune(tuned, ["optimizer.learning_rate"], configured, cast(TrainedPoints, runs), shown.append)
    assert len(shown) == len(found) == TUNED.trials
    return found


def parabola(rate: float) -> float:
    return 0.5 + (math.log10(rate) + 2) ** 2 / 10


@pytest.mark.parametrize("metric", ["logloss", "auc"])
def test_the_best_rate_is_found(metric: str) -> None:
    best = trials_of(Runs(parabola), metric=metric)[0]
    assert best.steps == 90
    assert abs(math.log10(best.settings["optimizer.learning_rate"]) + 2) < 0.5


def test_most_trials_end_early() -> None:
    runs = Runs(parabola)
    trials_of(runs)
    whole, compared = ([rate for rate, steps in runs.trained if steps == at] for at in (90, 10))
    assert len(compared) == TUNED.trials
    assert len(whole) < TUNED.trials / 2
    assert min(whole, key=parabola) == min(compared, key=parabola)


def test_every_arm_is_asked_the_same_and_so_is_a_sweep_that_starts_again() -> None:
    first, again = Runs(parabola), Runs(parabola)
    assert trials_of(first) == trials_of(again)
    assert first.trained == again.trained
    other = Runs(lambda rate: parabola(rate * 10))
    trials_of(other)
    rates = [list(dict.fromkeys(rate for rate, _ in each.trained)) for each in (first, other)]
    assert rates[0][:8] == rates[1][:8]


def test_an_arm_that_sets_one_of_two_settings_gets_the_same_first_values_of_the_other() -> None:
    settings = {**TUNED.settings, "optimizer.projections_learning_rate": Interval(1e-3, 1e-1)}
    both, one = Runs(parabola), Runs(parabola)
    tuned = dataclasses.replace(TUNED, settings=settings)
    trials = tune(tuned, list(settings), configured, cast(TrainedPoints, both), lambda trial: None)
    assert all(list(each.settings) == list(settings) for each in trials)
    trials = tune(tuned, ["optimizer.learning_rate"], configured, cast(TrainedPoints, one), lambda trial: None)
    assert all(list(each.settings) == ["optimizer.learning_rate"] for each in trials)
    rates = [list(dict.fromkeys(rate for rate, _ in each.trained))[:8] for each in (both, one)]
    assert rates[0] == rates[1]


def test_trials_that_diverge_are_not_chosen() -> None:
    found = trials_of(Runs(lambda rate: math.nan if rate > 0.003 else parabola(rate)))
    assert found[0].settings["optimizer.learning_rate"] <= 0.003
    assert any(math.isnan(each.value) for each in found)


def test_if_all_diverge_it_is_an_error() -> None:
    with pytest.raises(UserError, match="none of 12 trials came to step 90: all diverged; lower the values"):
        trials_of(Runs(lambda rate: math.nan))
