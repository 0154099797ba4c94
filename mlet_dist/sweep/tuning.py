"""Chooses the settings of an arm by successive halving (arXiv:1810.05934), the same way for every arm.

Optuna proposes the values and decides which trials go on. It keeps nothing on disk: the runs do, so that a sweep that
starts again asks the same questions, and gets the answers at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.quasirandom import SobolEngine

from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError
from mlet_dist.sweep.sweep_file import TuneConfig
from mlet_dist.sweep.trained_points import Outcome, TrainedPoints

_SEED = 0
_SPREAD_FIRST = 8  # trials whose values are spread evenly, before Optuna looks at results


@dataclass(frozen=True)
class Trial:
    """One combination of values, as far as it came.

    Attributes:
        settings: by name.
        steps: after which it was compared last.
        value: the metric then; NaN if the run diverged.
        outcome: of the last run.
    """

    settings: dict[str, float]
    steps: int
    value: float
    outcome: Outcome


def tune(
    tuned: TuneConfig,
    names: Sequence[str],
    configured: Callable[[dict[str, float], int], Config],
    points: TrainedPoints,
    shown: Callable[[Trial], None],
) -> list[Trial]:
    """Return the trials of an arm, the best first.

    Args:
        tuned: what is tuned, and how; its ``metric`` is a name in the summaries of runs, after ``valid_``.
        names: which of the settings of ``tuned`` are searched for this arm, which sets the others itself. The first
            trials have the same values as those of other arms nevertheless.
        configured: returns the arm's config with values of the settings, and with a number of steps.
        points: trains configs.
        shown: called with each trial when it has ended.

    Raises:
        UserError: no trial came to the end, or Optuna is not installed.
        Interrupted: ``points`` was stopped.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("tune.settings needs Optuna, which is not installed: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    compared_at = tuned.compared_at
    sign = -1 if tuned.metric.endswith("auc") else 1
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=_SEED, n_startup_trials=min(_SPREAD_FIRST, tuned.trials)),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=compared_at[0], reduction_factor=tuned.keep),
    )
    for values in _spread(tuned):
        study.enqueue_trial({name: values[name] for name in names})
    trials = []
    for _ in range(tuned.trials):
        asked = study.ask()
        intervals = {name: tuned.settings[name] for name in names}
        settings = {name: asked.suggest_float(name, each.low, each.high, log=True) for name, each in intervals.items()}
        configs = [configured(settings, steps) for steps in compared_at]
        for steps, config, start in zip(compared_at, configs, [None, *configs], strict=False):
            outcome = points.train(config, start)
            trial = Trial(settings, steps, _metric_of(outcome, tuned.metric), outcome)
            if math.isnan(trial.value):
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                break
            asked.report(sign * trial.value, steps)
            if steps < tuned.steps and asked.should_prune():
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(asked, sign * trial.value)
        for config in configs:
            points.forget_checkpoints(config)
        trials.append(trial)
        shown(trial)
    finished = [each for each in trials if each.steps == tuned.steps and not math.isnan(each.value)]
    if not finished:
        if any(each.outcome.diverged is None for each in trials):
            raise UserError(f"tune.metric: {tuned.metric} of the split valid is undefined; choose another metric")
        raise UserError(
            f"none of {tuned.trials} trials came to step {tuned.steps:,}: all diverged; lower the values of "
            "tune.settings"
        )
    others = [each for each in trials if each not in finished]
    return sorted(finished, key=lambda each: sign * each.value) + others


def _spread(tuned: TuneConfig) -> list[dict[str, float]]:
    """Return the values of the first trials: points of a Sobol sequence, on the logarithmic scale of the intervals."""
    points = SobolEngine(len(tuned.settings), scramble=True, seed=_SEED).draw(min(_SPREAD_FIRST, tuned.trials))
    return [
        {
            name: each.low * (each.high / each.low) ** at
            for (name, each), at in zip(tuned.settings.items(), point, strict=True)
        }
        for point in points.tolist()
    ]


def _metric_of(outcome: Outcome, metric: str) -> float:
    """Return a metric of the split valid; NaN if the run diverged."""
    if outcome.diverged is not None:
        return math.nan
    value = outcome.summary.get(f"valid_{metric}")
    return math.nan if value is None else float(value)
