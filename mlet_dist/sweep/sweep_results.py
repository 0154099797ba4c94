"""The results of a sweep: a Parquet file with a row for each run, and a table of the arms."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.atomic_file import replaced_file
from mlet_dist.config.config_file import Config
from mlet_dist.formatting import megabytes_text, text_table, to_json
from mlet_dist.sweep.arms import Arm
from mlet_dist.sweep.scored_points import Scored
from mlet_dist.sweep.trained_points import Outcome
from mlet_dist.training.label_metrics import metric_prefixes
from mlet_dist.training.summary_faults import dense_arch_fault

_DIGEST = b"mlet-sweep"  # of the file's metadata


def _metrics(labels: Sequence[str]) -> list[str]:
    prefixes = metric_prefixes(labels)
    return [
        f"{split}_{prefix}{name}" for split in ("valid", "test") for prefix in prefixes for name in ("auc", "logloss")
    ]


def _schema(labels: Sequence[str]) -> pa.Schema:
    return pa.schema(
        {
            "arm": pa.string(), "kind": pa.string(), "control_of": pa.string(), "stage": pa.string(),
            "embedding_dim": pa.int64(), "hidden_dim": pa.int64(), "seed": pa.int64(), "steps": pa.int64(),
            "settings": pa.string(), "fault": pa.string(), **dict.fromkeys(_metrics(labels), pa.float64()),
            "served_table_bytes": pa.int64(), "training_bytes_peak": pa.int64(), "seconds": pa.float64(),
            "runs_at_once": pa.int64(), "run": pa.string(), "scores": pa.string(), "outputs": pa.string(),
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One run of a sweep.

    Attributes:
        arm: of which it is.
        stage: ``tune`` for a trial, ``seed`` for a run with the chosen settings.
        config: its settings.
        tuned: the settings that were tuned, by name.
        outcome: what became of it.
        scored: its outputs and their scores; None for a trial, a faulty run, or a sweep without outputs.
    """

    arm: Arm
    stage: Literal["tune", "seed"]
    config: Config
    tuned: Mapping[str, float]
    outcome: Outcome
    scored: Scored | None = None

    @property
    def fault(self) -> str | None:
        """Why the run failed: it diverged, or its dense arch returns the same for all rows; None for a good run."""
        if self.outcome.diverged is not None:
            return self.outcome.diverged
        return dense_arch_fault(self.outcome.summary)

    def row(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the row of the Parquet file, with the metrics of each label."""
        summary = self.outcome.summary
        model = self.config.model
        return {
            "arm": self.arm.name,
            "kind": self.arm.kind,
            "control_of": self.arm.control_of,
            "stage": self.stage,
            "embedding_dim": model.embedding_dim,
            "hidden_dim": model.hidden_dim,
            "seed": self.config.train.seed,
            "steps": summary.get("steps"),
            "settings": to_json(dict(self.tuned)),
            "fault": self.fault,
            **{name: summary.get(name) for name in (*_metrics(labels), "served_table_bytes", "training_bytes_peak")},
            "seconds": self.outcome.seconds,
            "runs_at_once": self.outcome.runs_at_once,
            "run": str(self.outcome.run),
            "scores": None if self.scored is None else str(self.scored.path),
            "outputs": None if self.scored is None else to_json(dict(self.scored.outputs)),
        }


def write_results(
    results: Iterable[Result], path: Path, labels: Sequence[str], digest: str, *, complete: bool = True
) -> None:
    """Write the Parquet file.

    Args:
        results: of this process.
        path: of the file.
        labels: the names of those of the data set.
        digest: of what the sweep does.
        complete: whether these are all results. Otherwise those that other processes, or an earlier time, have written
            for a sweep with the same digest stay in the file.
    """
    own = [each.row(labels) for each in results]
    known = {_run_of(row) for row in own}
    others = [] if complete else [row for row in _written(path, digest) if _run_of(row) not in known]
    schema = _schema(labels).with_metadata({_DIGEST: digest.encode()})
    with replaced_file(path) as file:
        pq.write_table(pa.Table.from_pylist([*others, *own], schema), file)


def digest_of_results(path: Path) -> str | None:
    """Return the digest of the sweep that wrote a Parquet file; None if it cannot be read."""
    try:
        return (pq.read_schema(path).metadata or {}).get(_DIGEST, b"").decode() or None
    except (OSError, pa.ArrowException):
        return None


def _run_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["arm"], row["stage"], row["run"]


def _written(path: Path, digest: str) -> list[dict[str, Any]]:
    """Return the rows of a file of the same sweep; none if there is no such file."""
    try:
        table = pq.read_table(path)
        return table.to_pylist() if (table.schema.metadata or {}).get(_DIGEST) == digest.encode() else []
    except (OSError, pa.ArrowException):
        return []


def metric_in_words(name: str) -> str:
    """Return the name of a metric of a summary for people, as ``valid click LogLoss`` for ``valid_click_logloss``."""
    *words, metric = name.split("_")
    return " ".join([*words, {"logloss": "LogLoss", "auc": "AUC"}[metric]])


def results_table(results: Sequence[Result], split: str, labels: Sequence[str]) -> str:
    """Return a table of the arms: bytes, and the mean and spread of the metrics of good runs over the seeds."""
    prefixes = metric_prefixes(labels)
    titles = [metric_in_words(f"{split}_{prefix}{name}") for prefix in prefixes for name in ("logloss", "auc")]
    names = ["arm", "served", "in training", "good runs", *(each for title in titles for each in (title, "sd"))]
    rows = []
    for arm in dict.fromkeys(each.arm.name for each in results):
        runs = [each for each in results if each.arm.name == arm and each.stage == "seed"]
        good = [each.outcome.summary for each in runs if each.fault is None]
        sizes = [_size(good, "served_table_bytes"), _size(good, "training_bytes_peak")]
        metrics = [
            cell
            for prefix in prefixes
            for name in ("logloss", "auc")
            for cell in _mean_and_sd(good, f"{split}_{prefix}{name}")
        ]
        rows.append([arm, *sizes, f"{len(good)} of {len(runs)}", *metrics])
    faults = [f"{each.arm.name}, seed {each.config.train.seed}: {each.fault}" for each in results
              if each.stage == "seed" and each.fault is not None]  # fmt: skip
    left_out = ["", "Left out of all means:", *faults] if faults else []
    return "\n".join([*text_table(names, rows, 1), *left_out])


def _size(good: Sequence[Mapping[str, Any]], name: str) -> str:
    return megabytes_text(good[0][name]) if good else ""


def _mean_and_sd(good: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    values = [each[name] for each in good if each.get(name) is not None and not math.isnan(each[name])]
    mean = f"{statistics.mean(values):.4f}" if values else "undefined"
    return [mean, f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""]
