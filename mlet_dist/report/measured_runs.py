"""The runs that a report is about: those of sweeps and comparisons, and single ones."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.comparison_report import CONTROL, MLET
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError, print_warning
from mlet_dist.formatting import load_json, to_json
from mlet_dist.sweep.arms import settings_of_control
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.summary_faults import dense_arch_fault

PLAIN = "dcp"
"""The output with float32 tables, before the variants of compressed runs, as dcp-mixed."""

SPLITS = ("valid", "test")


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run of an arm with one seed, or one that failed.

    Attributes:
        arm: the name of its model.
        kind: ``single`` (no W2), ``mlet``, ``single_compressed``, or ``control``.
        config: its settings.
        tuned: those that a sweep chose, by name.
        summary: the run's summary; empty if it diverged.
        run: its directory.
        fault: why it failed; None if it did not.
        outputs: by output, ``served_bytes``, and by split its ``auc`` and ``logloss`` or those of each label.
        scores: the directory with a Parquet file of scores for each split and output; None if there are no scores.
        control_of: of a control, the arm that it belongs to.
        runs_at_once: how many runs were trained on the machine at the same time, at most; None if that is not known.
    """

    arm: str
    kind: str
    config: Config
    tuned: Mapping[str, float]
    summary: Mapping[str, Any]
    run: Path
    fault: str | None
    outputs: Mapping[str, Mapping[str, Any]]
    scores: Path | None
    control_of: str | None = None
    runs_at_once: int | None = None

    @property
    def seed(self) -> int:
        return self.config.train.seed

    def scores_of(self, split: str, output: str) -> Path | None:
        """Return the file with the scores of an output, or None if there is none."""
        path = None if self.scores is None else self.scores / split / f"{output}.parquet"
        return path if path is not None and path.exists() else None


def measured_runs(directories: Iterable[Path]) -> list[MeasuredRun]:
    """Return the runs of directories that `mlet sweep`, `mlet compare` and `mlet train` made.

    Single runs whose settings differ in the seed alone are one arm. Arms of the same name in several directories are
    told apart by their directory. A single run that is one of a sweep or a comparison is left to that.

    Raises:
        UserError: a directory is none of these, has no finished run, or a file is damaged.
    """
    found: list[MeasuredRun] = []
    alone: list[bool] = []  # whether each was named by itself
    settings: dict[str, str] = {}
    singles: dict[str, str] = {}
    for path in directories:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; expected one that `mlet sweep`, `compare` or `train` made")
        if (path / "results.parquet").exists():
            runs = _of_sweep(path)
        elif (path / "comparison.json").exists():
            runs = _of_comparison(path)
        elif RunDirectory(path).config.exists():
            run = _single(path)
            runs = [dataclasses.replace(run, arm=singles.get(_without_seed(run.config), run.arm))]
        else:
            raise UserError(
                f"{path}: neither of results.parquet of `mlet sweep`, comparison.json of `mlet compare` and a run of "
                "`mlet train` is there"
            )
        if not runs:
            raise UserError(f"{path}: no run has ended yet")
        others = dict(settings)
        arms: list[str] = []
        for each in runs:
            own = _without_seed(each.config)
            names = (each.arm, f"{each.arm} ({path.name})", f"{each.arm} ({path})")
            arm = next((name for name in names if others.get(name, own) == own), names[-1])
            settings[arm] = own
            if each.run == path:
                singles[own] = arm
            arms.append(arm)
        arm_of = {each.arm: arm for each, arm in zip(runs, arms, strict=True)}
        found += [
            dataclasses.replace(each, arm=arm, control_of=arm_of.get(each.control_of or "", each.control_of))
            for each, arm in zip(runs, arms, strict=True)
        ]
        alone += [len(runs) == 1 and runs[0].run == path] * len(runs)
    of_others = {run.run.resolve() for run, is_alone in zip(found, alone, strict=True) if not is_alone}
    return _each_seed_once(
        run for run, is_alone in zip(found, alone, strict=True) if not (is_alone and run.run.resolve() in of_others)
    )


def _each_seed_once(runs: Iterable[MeasuredRun]) -> list[MeasuredRun]:
    """Return one run for each arm and seed: of several that with scores, or with more outputs, or the first.

    A run that several sweeps measured in other outputs has all of these.
    """
    found: dict[tuple[str, int], MeasuredRun] = {}
    for run in runs:
        first = found.setdefault((run.arm, run.seed), run)
        if first.run.resolve() != run.run.resolve():
            print_warning(
                f"{first.run} and {run.run} have the same settings and the same train.seed; the report has one of them"
            )
        elif first.scores is not None and run.scores is not None and first.scores.resolve() == run.scores.resolve():
            found[run.arm, run.seed] = dataclasses.replace(first, outputs={**first.outputs, **run.outputs})
            continue
        if _measured(run) > _measured(first):
            found[run.arm, run.seed] = run
    return list(found.values())


def _measured(run: MeasuredRun) -> tuple[bool, int]:
    """Return how much is known of a run, for comparisons: whether it has scores, and the number of its outputs."""
    return run.scores is not None, len(run.outputs)


def _of_sweep(path: Path) -> list[MeasuredRun]:
    file = path / "results.parquet"
    try:
        rows = [row for row in pq.read_table(file).to_pylist() if row["stage"] == "seed"]
        if not (path / "results.txt").exists():
            print_warning(f"{path}: the sweep has not ended yet; the report is about the runs that have")
        return [_of_row(row, path) for row in rows]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}; run the sweep again") from None


def _of_row(row: Mapping[str, Any], path: Path) -> MeasuredRun:
    run = RunDirectory(_moved(Path(row["run"]), path))
    summary: dict[str, Any] = {}
    if row["fault"] is None or run.summary.exists():
        config, _, summary = run.load()
    else:  # a run that diverged has no summary
        config = run.load_config()
    # Results of earlier versions do not have these columns.
    scores = None if row.get("scores") is None else _moved(Path(row["scores"]), path)
    outputs = json.loads(row["outputs"]) if row.get("outputs") else {}
    if not any(name.partition("-")[0] == PLAIN for name in outputs):
        outputs |= _outputs_of_summary(summary)
    tuned = json.loads(row["settings"])
    # An arm of a sweep's file without W2 is a single layer there, whether it is compressed or not.
    kind = _kind(config) if row["kind"] == "single" else row["kind"]
    control_of = row.get("control_of")
    if control_of is None and kind == CONTROL:
        control_of = row["arm"].removeprefix("control of ")  # as results of earlier versions have it
    if kind == CONTROL:  # results of earlier versions have the settings of its MLET arm
        tuned = settings_of_control(config, tuned)
    return MeasuredRun(
        row["arm"],
        kind,
        config,
        tuned,
        summary,
        run.path,
        row["fault"],
        outputs,
        scores,
        control_of,
        row.get("runs_at_once"),
    )


def _moved(recorded: Path, sweep: Path) -> Path:
    """Return a path that a sweep recorded, or where it is if the sweep's directory was moved or copied."""
    beside = sweep / "runs" / recorded.name
    return beside if not recorded.exists() and beside.exists() else recorded


def _of_comparison(path: Path) -> list[MeasuredRun]:
    file = path / "comparison.json"
    try:
        content = load_json(file)
        found = []
        for name in content["arms"]:
            run = dataclasses.replace(_single(path / name), arm=name, kind=name)
            scores = path / f"{name}-scores"
            served = content["arms"][name]["served_bytes"]
            plain = _outputs_of_summary(run.summary)[PLAIN]
            outputs = {output: plain | {"served_bytes": size} for output, size in served.items()}
            found.append(
                dataclasses.replace(
                    run,
                    outputs=outputs,
                    scores=scores if scores.is_dir() else None,
                    control_of=MLET if name == CONTROL else None,
                    runs_at_once=1,
                )
            )
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error!r}; compare again") from None


def _single(path: Path) -> MeasuredRun:
    config, _, summary = RunDirectory(path).load()
    fault, outputs = dense_arch_fault(summary), _outputs_of_summary(summary)
    return MeasuredRun(path.name, _kind(config), config, {}, summary, path, fault, outputs, None)


def _kind(config: Config) -> str:
    if config.model.has_two_layers:
        return "mlet"
    return "single" if config.compression.policy == "none" else "single_compressed"


def _outputs_of_summary(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the float32 output, as far as training measured it."""
    if not summary:
        return {}
    of_splits: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        split, _, metric = key.partition("_")
        if split in SPLITS and metric.endswith(("auc", "logloss")) and value is not None:
            of_splits.setdefault(split, {})[metric] = value
    return {PLAIN: {"served_bytes": summary["served_table_bytes"], **of_splits}}


def _without_seed(config: Config) -> str:
    """Return the settings that arms differ in, as text."""
    plain = config.to_dict()
    del plain["run"], plain["train"]["seed"]
    return to_json(plain)
