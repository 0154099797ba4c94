"""`mlet sweep`: tunes all arms and trains them with each seed, several at once; what is finished is not done again."""

import dataclasses
import hashlib
import json
import os
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from mlet_dist.config.config_file import Config
from mlet_dist.config.validation_settings import metrics_to_choose_by
from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, writing
from mlet_dist.progress import Progress
from mlet_dist.sweep.arms import Arm, arms_of, control_config, settings_of_control, with_settings
from mlet_dist.sweep.logged_commands import LoggedCommands
from mlet_dist.sweep.scored_points import ScoredPoints, outputs_of, quantised_of
from mlet_dist.sweep.shared_directory import Claims, exclusive, joined
from mlet_dist.sweep.sweep_file import SweepConfig, TuneConfig
from mlet_dist.sweep.sweep_results import Result, digest_of_results, metric_in_words, results_table, write_results
from mlet_dist.sweep.trained_points import TrainedPoints, digest_of
from mlet_dist.sweep.tuning import Trial, tune

_LOOK_AGAIN_SECONDS = 2.0


def run_sweep(sweep: SweepConfig, out: Path) -> dict[str, Any]:
    """Tune each arm on the split valid, train it with each seed, and write the results into a directory.

    Several processes may do so at the same time, also on several nodes that share ``out`` and the place of the runs:
    each arm is the work of one of them, and each ends with the results of all.

    Files in ``out``: results.parquet, a row for each run (also while the sweep runs, of all processes); results.txt, a
    table of the arms; arms, the YAML files of the arms as they were chosen; and runs, unless the sweep has another
    place for them.

    Returns:
        ``out``, ``runs`` (the number of runs) and ``arms``: by name, the ``settings`` that were chosen, and the
        ``faults`` of the runs with these by seed.

    Raises:
        UserError: an arm or the data set does not fit, a run failed, a file cannot be written, another sweep works into
            ``out``, or there are fewer GPUs than the ranks of all workers need.
        Interrupted: a signal came; the same command goes on.
    """
    arms = arms_of(sweep)
    for arm in arms:
        _check_data(arm, arms[0], sweep)
    content = dataclasses.asdict(dataclasses.replace(sweep, workers=1))
    # The file that the sweep's file names, and the data, may have changed.
    content["runs_of_arms"] = [digest_of(arm.config) for arm in arms]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    environments = [_environment(worker, sweep) for worker in range(sweep.workers)]
    with joined(out, digest):
        return _Sweep(sweep, out, arms, environments, digest).run()


class _Sweep:
    def __init__(
        self,
        sweep: SweepConfig,
        out: Path,
        arms: list[Arm],
        environments: Sequence[Mapping[str, str]],
        digest: str,
    ) -> None:
        self._sweep, self._out, self._environments, self._digest = sweep, out, environments, digest
        self._arms = {arm.name: arm for arm in arms}
        self._claims, self._pending = Claims(out / "arms"), list(arms)
        self._commands = LoggedCommands(sweep.workers)
        runs = Path(sweep.runs) if sweep.runs is not None else out / "runs"
        self._points = TrainedPoints(runs, sweep.nproc, self._commands, sweep.workers)
        self._results: list[Result] = []
        self._lock = threading.Lock()
        self._chosen: dict[str, dict[str, float]] = {}
        trials = sweep.tune.trials * sum(bool(arm.tuned_settings(sweep)) for arm in arms)
        self._progress = Progress("sweep", trials + len(sweep.seeds) * len(arms), "runs")
        self._good: dict[str, list[float]] = {}  # by arm, the LogLoss of its good runs with a seed, by which arms rank
        schema = DatasetSchema.load(data_set_path(arms[0].config.data.path))
        self._labels = schema.labels
        self._splits = [split for split in ("valid", "test") if schema.rows.get(split)]
        self._scored = ScoredPoints(self._commands, self._splits)
        self._tune = dataclasses.replace(sweep.tune, metric=_metric(sweep.tune, schema.labels))
        self._split = self._splits[-1]  # of the table
        # With several labels it is of that by which trials are compared.
        self._shown = self._tune.metric.removesuffix("auc").removesuffix("logloss") + "logloss"

    def run(self) -> dict[str, Any]:
        self._begin()
        with self._progress, ThreadPoolExecutor(self._sweep.workers) as pool:
            waiting = [pool.submit(self._work, environment) for environment in self._environments]
            try:
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
                for each in done:
                    each.result()
            except BaseException:
                self._commands.stop()
                raise
        self._write(complete=True)
        table = results_table(self._results, self._split, self._labels)
        with writing(self._out):
            (self._out / "results.txt").write_text(table + "\n", encoding="utf-8")
        return {
            "out": str(self._out),
            "runs": len(self._results),
            "arms": {
                name: {
                    "settings": self._chosen[name],
                    "faults": {
                        str(each.config.train.seed): each.fault
                        for each in self._results
                        if each.arm.name == name and each.stage == "seed" and each.fault is not None
                    },
                }
                for name in self._arms
            },
        }

    def _begin(self) -> None:
        """Remove what another sweep, whose results these will replace, has left in the directory as its final results.

        Its results.parquet stays until the first run of this one has ended.
        """
        with exclusive(self._out / ".results.lock", self._commands.wait), writing(self._out):
            if digest_of_results(self._out / "results.parquet") != self._digest:
                (self._out / "results.txt").unlink(missing_ok=True)
                for file in (self._out / "arms").glob("[0-9]*.yaml"):
                    file.unlink(missing_ok=True)

    def _work(self, environment: Mapping[str, str]) -> None:
        """Complete arms until all are."""
        self._commands.set_environment(environment)
        while (arm := self._next()) is not None:
            try:
                self._complete(arm)
            finally:
                self._claims.release(self._file(arm).name)

    def _next(self) -> Arm | None:
        """Return an arm on which nothing works, or None if none is left; wait while others work on all that are left.

        An arm that another process has completed takes no time. A control comes after the arm that it follows.
        """
        while True:
            with self._lock:
                for arm in self._pending:
                    is_next = arm.control_of is None or arm.control_of in self._chosen
                    if is_next and self._claims.claim(self._file(arm).name):
                        self._pending.remove(arm)
                        return arm
                if not self._pending:
                    return None
            self._commands.wait(_LOOK_AGAIN_SECONDS)

    def _file(self, arm: Arm) -> Path:
        return self._out / "arms" / f"{list(self._arms).index(arm.name):03}.yaml"

    def _other_file(self, arm: Arm) -> Path:
        """Return a file for settings that are not those that are chosen, which may be left when a sweep is killed."""
        file = self._file(arm)
        return file.with_name(f".{file.stem}.trial.yaml")

    def _complete(self, arm: Arm) -> None:
        """Tune an arm and train it with each seed."""
        config, settings = self._choose(arm)
        with writing(self._out):
            self._other_file(arm).unlink(missing_ok=True)
        self._chosen[arm.name] = settings
        for seed in self._sweep.seeds:
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            outcome = self._points.train(seeded, keep=True)
            result = Result(arm, "seed", seeded, settings, outcome)
            if result.fault is None and self._sweep.outputs:
                outputs = outputs_of(seeded, self._sweep.outputs)
                result = dataclasses.replace(result, scored=self._scored.score(outcome, seeded, outputs))
            self._add(result)

    def _choose(self, arm: Arm) -> tuple[Config, dict[str, float]]:
        file = self._file(arm)
        other = self._other_file(arm)
        if arm.control_of is not None:
            settings = self._chosen[arm.control_of]
            mlet = with_settings(self._arms[arm.control_of], settings, other)
            config = with_settings(dataclasses.replace(arm, config=control_config(mlet)), {}, file)
            return config, settings_of_control(config, settings)
        names = arm.tuned_settings(self._sweep)
        if not names:
            return with_settings(arm, {}, file), {}

        def configured(settings: dict[str, float], steps: int) -> Config:
            # Trials have the first seed: what is chosen must not depend on luck that other arms do not have.
            own = {**settings, "train.max_steps": steps, "train.seed": self._sweep.seeds[0]}
            return with_settings(arm, own, other)

        def shown(trial: Trial) -> None:
            self._add(Result(arm, "tune", configured(trial.settings, trial.steps), trial.settings, trial.outcome))

        best = tune(self._tune, names, configured, self._points, shown)[0]
        return with_settings(arm, best.settings, file), best.settings

    def _add(self, result: Result) -> None:
        with self._lock:
            self._results.append(result)
            self._write(complete=False)
            summary, is_seed = result.outcome.summary, result.stage == "seed"
            # Arms rank as a report ranks them: by the split on which they are chosen, and by the mean over the seeds.
            ranked_by = f"{self._splits[0]}_{self._shown}"
            if is_seed and result.fault is None and summary.get(ranked_by) is not None:
                self._good.setdefault(result.arm.name, []).append(summary[ranked_by])
            means = {name: statistics.mean(values) for name, values in self._good.items()}
            best = min(means, key=means.__getitem__, default=None)
            shown = {} if best is None else {"best": f"{best} {metric_in_words(ranked_by)} {means[best]:.4f}"}
            self._progress.update(1, found=result.outcome.found, **shown)
            what = f"seed {result.config.train.seed}" if is_seed else _trial_in_words(result)
            # A trial is chosen by the split valid alone, whatever it has on the split test.
            names = [f"{split}_{self._shown}" for split in self._splits] if is_seed else [f"valid_{self._tune.metric}"]
            metrics = [
                f"{metric_in_words(name)} {summary[name]:.4f}" for name in names if summary.get(name) is not None
            ]
            ended = result.fault or ", ".join(metrics) or "no metrics"
            self._progress.log(f"{result.arm.name}, {what}: {ended}")

    def _write(self, *, complete: bool) -> None:
        with writing(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
        # Processes that share the work write the same file.
        with exclusive(self._out / ".results.lock", self._commands.wait), writing(self._out):
            write_results(self._results, self._out / "results.parquet", self._labels, self._digest, complete=complete)


def _trial_in_words(result: Result) -> str:
    settings = ", ".join(f"{name} {value:.4g}" for name, value in result.tuned.items())
    return f"trial of {result.config.train.max_steps:,} steps, {settings}"


def _environment(worker: int, sweep: SweepConfig) -> dict[str, str]:
    """Return the environment variables of the runs of a worker: with GPUs, those of its ranks."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = torch.cuda.device_count()
    if not found:
        return {}
    devices = visible.split(",") if visible else [str(index) for index in range(found)]
    if sweep.nproc > found:
        raise UserError(f"nproc is {sweep.nproc}, and this machine has {found} GPUs; lower nproc to {found}")
    if sweep.workers * sweep.nproc > found:
        raise UserError(
            f"workers is {sweep.workers} and nproc {sweep.nproc}, which takes {sweep.workers * sweep.nproc} GPUs, and "
            f"this machine has {found}; lower workers to {found // sweep.nproc}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[worker * sweep.nproc : (worker + 1) * sweep.nproc])}


def _check_data(arm: Arm, first: Arm, sweep: SweepConfig) -> None:
    tune = sweep.tune
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
    quantised = quantised_of(outputs_of(arm.config, sweep.outputs))
    for problem in check_classes(path, schema, ("valid", "test") if quantised else ()):
        raise UserError(
            f"{problem}. The outputs {', '.join(quantised)} are verified by their AUC: set outputs to [dcp], or "
            "prepare another split"
        )


def _metric(tune: TuneConfig, labels: Sequence[str]) -> str:
    known = metrics_to_choose_by(labels)
    if tune.metric not in known:
        raise UserError(f"tune.metric is {tune.metric}; the data set's labels have {', '.join(known)}")
    return known[tune.metric]
