"""Learning rate schedules: linear warm-up, then constant, linear or cosine decay."""

import math
from collections.abc import Callable

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.training.state import Training


def learning_rate_factor(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Return a function from the number of steps done to the factor on all learning rates in the next step.

    The factor rises linearly from 1/warmup_steps to 1 over ``warmup_steps``, stays at 1 until ``decay_start``, and then
    decays so that it would reach 0 in the step after the last.

    Args:
        config: the ``optimizer`` section.
        steps: the number of steps of the whole run.
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
    """Sets the learning rate of every parameter group for the next step, relative to its initial value.

    Args:
        config: the ``optimizer`` section.
        training: the state that the job starts from.
    """

    def __init__(self, config: OptimizerConfig, training: Training) -> None:
        self._factor = learning_rate_factor(config, training.steps)
        self._groups = [(group, group["lr"]) for group in training.optimizer.param_groups]
        self(training)

    def __call__(self, training: Training) -> None:
        """Set the rates; called after each step."""
        factor = self._factor(training.updates)
        for group, initial in self._groups:
            group["lr"] = initial * factor


def schedule_warnings(config: OptimizerConfig, steps: int) -> list[str]:
    """Return a warning for each setting of the schedule that a run of ``steps`` steps does not reach."""
    warnings = []
    if config.warmup_steps >= steps:
        warnings.append(
            f"optimizer.warmup_steps {config.warmup_steps}: the warm-up does not end within the run's {steps} steps"
        )
    elif config.decay_start is not None and config.decay_start >= steps:
        warnings.append(f"optimizer.decay_start {config.decay_start} is not reached within the run's {steps} steps")
    return warnings
