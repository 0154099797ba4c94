"""`mlet sweep`: tunes all arms and trains them with each seed, several at once; what is finished is not done again."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.validation_settings import metrics_to_choose_by
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, writing
from mlet_dist.progress import Progress
from mlet_dist.sweep.arms import Arm, arms_of, control_config, with_settings
from mlet_dist.sweep.logged_commands import LoggedCommands
from mlet_dist.sweep.scored_points import ScoredPoints, outputs_of
from mlet_dist.sweep.sweep_file import SweepConfig, TuneConfig
from mlet_dist.sweep.sweep_results import Result, results_table, write_results
from mlet_dist.sweep.trained_points import TrainedPoints
from mlet_dist.sweep.tuning import Trial, tune
from mlet_dist.training.run_directory import lock_file


def run_sweep(sweep: SweepConfig, out: Path) -> dict[str, Any]:
    """Tune each arm on the split valid, train it with each seed, and write the results into a directory.

    Files in ``out``: results.parquet, a row for each run (also while the sweep runs); results.txt, a table of the arms;
    arms, the YAML files of the arms as they were chosen; and runs, unless the sweep has another place for them.

    Returns:
        ``out``, ``runs`` (the number of runs) and ``arms``: by name, the ``settings`` that were chosen, and the
        ``faults`` of the runs with these by seed.

    Raises:
        UserError: an arm or the data set does not fit, a run failed, or a file cannot be written.
        Interrupted: a signal came; the same command goes on.
    """
    arms = arms_of(sweep)
    for arm in arms:
        _check_data(arm, arms[0], sweep.tune)
    with lock_file(out / ".mlet-sweep", f"--out {out}"):
        return _Sweep(sweep, out, arms).run()


class _Sweep:
    def __init__(self, sweep: SweepConfig, out: Path, arms: list[Arm]) -> None:
        self._sweep, self._out = sweep, out
        self._arms = {arm.name: arm for arm in arms}
        self._commands = LoggedCommands()
        runs = Path(sweep.runs) if sweep.runs is not None else out / "runs"
        self._points = TrainedPoints(runs, sweep.nproc, self._commands)
        self._results: list[Result] = []
        self._lock = threading.Lock()
        self._chosen: dict[str, Future[dict[str, float]]] = {arm.name: Future() for arm in arms}
        trials = sweep.tune.trials if sweep.tune.settings else 0
        tuned = sum(arm.control_of is None for arm in arms)
        self._progress = Progress("sweep", trials * tuned + len(sweep.seeds) * len(arms), "runs")
        self._best: dict[str, float] = {}
        schema = DatasetSchema.load(data_set_path(arms[0].config.data.path))
        self._labels = schema.labels
        self._scored = ScoredPoints(self._commands, [split for split in ("valid", "test") if split in schema.parts])
        self._tune = dataclasses.replace(sweep.tune, metric=_metric(sweep.tune, schema.labels))
        self._split = "test" if "test" in schema.parts else "valid"  # of the results that are shown
        # With several labels it is of that by which trials are compared.
        self._shown = self._tune.metric.removesuffix("auc").removesuffix("logloss") + "logloss"

    def run(self) -> dict[str, Any]:
        # Controls come last: each waits for the arm that it belongs to, which must have begun.
        ordered = sorted(self._arms.values(), key=lambda arm: arm.control_of is not None)
        with self._progress, ThreadPoolExecutor(self._sweep.workers) as pool:
            waiting = [pool.submit(self._complete, arm) for arm in ordered]
            try:
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
                for each in done:
                    each.result()
            except BaseException:
                for each in waiting:
                    each.cancel()
                self._commands.stop()
                raise
        self._write()
        table = results_table(self._results, self._split, self._labels)
        with writing(self._out):
            (self._out / "results.txt").write_text(table + "\n", encoding="utf-8")
        return {
            "out": str(self._out),
            "runs": len(self._results),
            "arms": {
                name: {
                    "settings": self._chosen[name].result(),
                    "faults": {
                        str(each.config.train.seed): each.fault
                        for each in self._results
                        if each.arm.name == name and each.stage == "seed" and each.fault is not None
                    },
                }
                for name in self._arms
            },
        }

    def _complete(self, arm: Arm) -> None:
        """Tune an arm and train it with each seed."""
        try:
            config, settings = self._choose(arm)
        except BaseException as error:
            self._chosen[arm.name].set_exception(error)
            raise
        self._chosen[arm.name].set_result(settings)
        for seed in self._sweep.seeds:
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            outcome = self._points.train(seeded, keep=True)
            result = Result(arm, "seed", seeded, settings, outcome)
            if result.fault is None and self._sweep.outputs:
                outputs = outputs_of(seeded, self._sweep.outputs)
                result = dataclasses.replace(result, scored=self._scored.score(outcome, seeded, outputs))
            self._add(result)

    def _choose(self, arm: Arm) -> tuple[Config, dict[str, float]]:
        file = self._out / "arms" / f"{list(self._arms).index(arm.name):03}.yaml"
        if arm.control_of is not None:
            settings = self._chosen[arm.control_of].result()
            mlet = with_settings(self._arms[arm.control_of], settings, file)
            control = dataclasses.replace(arm, config=control_config(mlet))
            return with_settings(control, {}, file), settings
        if not self._sweep.tune.settings:
            return with_settings(arm, {}, file), {}

        def configured(settings: dict[str, float], steps: int) -> Config:
            # Trials have the first seed: what is chosen must not depend on luck that other arms do not have.
            own = {**settings, "train.max_steps": steps, "train.seed": self._sweep.seeds[0]}
            return with_settings(arm, own, file)

        def shown(trial: Trial) -> None:
            self._add(Result(arm, "tune", configured(trial.settings, trial.steps), trial.settings, trial.outcome))

        best = tune(self._tune, configured, self._points, shown)[0]
        return with_settings(arm, best.settings, file), best.settings

    def _add(self, result: Result) -> None:
        with self._lock:
            self._results.append(result)
            self._write()
            value = result.outcome.summary.get(f"{self._split}_{self._shown}")
            if result.stage == "seed" and value is not None and result.fault is None:
                self._best[result.arm.name] = min(value, self._best.get(result.arm.name, value))
            best = min(self._best.items(), key=lambda each: each[1], default=None)
            shown = {} if best is None else {"best": f"{best[0]} {self._split} LogLoss {best[1]:.4f}"}
            self._progress.update(1, **shown)
            what = f"seed {result.config.train.seed}" if result.stage == "seed" else f"trial {dict(result.tuned)}"
            ended = result.fault or f"LogLoss {value:.4f}" if value is not None or result.fault else "no metrics"
            self._progress.log(f"{result.arm.name}, {what}: {ended}")

    def _write(self) -> None:
        with writing(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
            write_results(self._results, self._out / "results.parquet", self._labels)


def _check_data(arm: Arm, first: Arm, tune: TuneConfig) -> None:
    path, of_first = (data_set_path(each.config.data.path) for each in (arm, first))
    schema, others = DatasetSchema.load(path), DatasetSchema.load(of_first)
    parts = schema.parts
    if (schema.labels if schema.more_labels else ()) != (others.labels if others.more_labels else ()):
        raise UserError(
            f"{path}: has the labels {', '.join(schema.labels)}, and {of_first} {', '.join(others.labels)}; all arms "
            "of a sweep predict the same labels"
        )
    metric = _metric(tune, schema.labels)
    if tune.settings and "valid" not in parts:
        raise UserError(f"{path}: has no valid split, by which settings are tuned; leave tune out, or prepare one")
    if tune.settings:
        counts = schema.label_counts["valid"]
        label = next(iter(counts)) if len(counts) == 1 else metric.removesuffix("_auc").removesuffix("_logloss")
        ones, known = counts[label]
        if not known or (metric.endswith("auc") and ones in (0, known)):
            raise UserError(
                f"tune.metric is {tune.metric}, which the split valid of {path} leaves undefined: {ones:,} of the "
                f"{known:,} rows with {label} have 1; choose another metric, or prepare another split"
            )
    if not {"valid", "test"} & set(parts):
        raise UserError(f"{path}: has neither a test nor a valid split, so that there is nothing to compare models on")


def _metric(tune: TuneConfig, labels: Sequence[str]) -> str:
    known = metrics_to_choose_by(labels)
    if tune.metric not in known:
        raise UserError(f"tune.metric is {tune.metric}; the data set's labels have {', '.join(known)}")
    return known[tune.metric]
