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
from mlet_dist.formatting import text_table, to_json
from mlet_dist.sweep.arms import Arm
from mlet_dist.sweep.trained_points import Outcome

_METRICS = [f"{split}_{name}" for split in ("valid", "test") for name in ("auc", "logloss")]
_SCHEMA = pa.schema(
    {
        "arm": pa.string(), "kind": pa.string(), "stage": pa.string(), "embedding_dim": pa.int64(),
        "hidden_dim": pa.int64(), "seed": pa.int64(), "steps": pa.int64(), "settings": pa.string(),
        "fault": pa.string(), **dict.fromkeys(_METRICS, pa.float64()), "served_table_bytes": pa.int64(),
        "training_bytes_peak": pa.int64(), "seconds": pa.float64(), "run": pa.string(),
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
    """

    arm: Arm
    stage: Literal["tune", "seed"]
    config: Config
    tuned: Mapping[str, float]
    outcome: Outcome

    @property
    def fault(self) -> str | None:
        """Why the run tells nothing of its settings: it diverged, or its dense arch died; None for a good run."""
        if self.outcome.diverged is not None:
            return self.outcome.diverged
        if self.outcome.summary.get("dense_arch_varies") is False:
            return "the dense arch returns the same for all rows"
        return None

    def row(self) -> dict[str, Any]:
        """Return the row of the Parquet file."""
        summary = self.outcome.summary
        model = self.config.model
        return {
            "arm": self.arm.name,
            "kind": self.arm.kind,
            "stage": self.stage,
            "embedding_dim": model.embedding_dim,
            "hidden_dim": model.hidden_dim,
            "seed": self.config.train.seed,
            "steps": summary.get("steps"),
            "settings": to_json(dict(self.tuned)),
            "fault": self.fault,
            **{name: summary.get(name) for name in (*_METRICS, "served_table_bytes", "training_bytes_peak")},
            "seconds": self.outcome.seconds,
            "run": str(self.outcome.run),
        }


def write_results(results: Iterable[Result], path: Path) -> None:
    """Write the Parquet file."""
    with replaced_file(path) as file:
        pq.write_table(pa.Table.from_pylist([each.row() for each in results], _SCHEMA), file)


def results_table(results: Sequence[Result], split: str) -> str:
    """Return a table of the arms: bytes, and the mean and spread of the metrics of good runs over the seeds."""
    names = ["arm", "served", "in training", "good runs", f"{split} LogLoss", "sd", f"{split} AUC", "sd"]
    rows = []
    for arm in dict.fromkeys(each.arm.name for each in results):
        runs = [each for each in results if each.arm.name == arm and each.stage == "seed"]
        good = [each.outcome.summary for each in runs if each.fault is None]
        sizes = [_size(good, "served_table_bytes"), _size(good, "training_bytes_peak")]
        metrics = [cell for name in ("logloss", "auc") for cell in _mean_and_sd(good, f"{split}_{name}")]
        rows.append([arm, *sizes, f"{len(good)} of {len(runs)}", *metrics])
    faults = [f"{each.arm.name}, seed {each.config.train.seed}: {each.fault}" for each in results
              if each.stage == "seed" and each.fault is not None]  # fmt: skip
    left_out = ["", "Left out of all means:", *faults] if faults else []
    return "\n".join([*text_table(names, rows, 1), *left_out])


def _size(good: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{good[0][name] / 1e6:,.1f} MB" if good else ""


def _mean_and_sd(good: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    values = [each[name] for each in good if each.get(name) is not None and not math.isnan(each[name])]
    mean = f"{statistics.mean(values):.4f}" if values else "undefined"
    return [mean, f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""]
