"""How the learning rates change over a run."""

import math
from collections.abc import Callable

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.training.state import Training


def learning_rate_factor(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """The factor on all learning rates in the step that follows ``done`` steps, as a function of ``done`` alone.

    It rises linearly over ``warmup_steps``, from 1/warmup_steps to 1, stays there until ``decay_start`` and falls from
    then on, so that it would be 0 in the step after the run's last.

    Args:
        steps: of the whole run.
    """
    start = config.warmup_steps if config.decay_start is None else config.decay_start

    def factor(done: int) -> float:
        if done < config.warmup_steps:
            return (done + 1) / config.warmup_steps
        if config.decay == "constant" or done <= start:
            return 1.0
        fallen = min(1.0, (done - start) / max(1, steps - start))
        return 1 - fallen if config.decay == "linear" else (1 + math.cos(math.pi * fallen)) / 2

    return factor


class LearningRates:
    """Sets all learning rates, each by its initial value, for the step that follows.

    Args:
        training: as it is taken up.
    """

    def __init__(self, config: OptimizerConfig, training: Training) -> None:
        self._factor = learning_rate_factor(config, training.steps)
        self._groups = [(group, group["lr"]) for group in training.optimizer.param_groups]
        self(training)

    def __call__(self, training: Training) -> None:
        """After a step."""
        factor = self._factor(training.updates)
        for group, initial in self._groups:
            group["lr"] = initial * factor


def schedule_warnings(config: OptimizerConfig, steps: int) -> list[str]:
    """Settings that a run of ``steps`` steps does not reach, one line each."""
    found = []
    if config.warmup_steps >= steps:
        found.append(f"optimizer.warmup_steps {config.warmup_steps} is not over within the run's {steps} steps")
    elif config.decay_start is not None and config.decay_start >= steps:
        found.append(f"optimizer.decay_start {config.decay_start} is not reached within the run's {steps} steps")
    return found
