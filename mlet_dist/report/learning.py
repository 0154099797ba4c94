"""What the runs of an arm recorded while they trained, and how much of their columns their tables use."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.spectrum.run_spectrum import spectrum_of
from mlet_dist.quality.score_metrics import Floats
from mlet_dist.report.measured_runs import MeasuredRun
from mlet_dist.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Curve:
    """The mean over the runs of an arm of a loss by step.

    Attributes:
        steps: ``(S,)``.
        losses: ``(S,)``.
    """

    steps: Floats
    losses: Floats


@dataclass(frozen=True)
class Cost:
    """What training took, as medians over the runs of an arm.

    Attributes:
        step_ms: the time of a step.
        samples_per_s: rows per second.
        peak_memory: of the rank that took most, in bytes; of the device, or the resident memory on a CPU.
        device: cpu or cuda.
        ranks: their number.
        runs_at_once: how many runs shared the machine, at most; None if that is not known.
    """

    step_ms: float
    samples_per_s: float
    peak_memory: int
    device: str
    ranks: int
    runs_at_once: int | None


def curve_of(runs: Sequence[MeasuredRun]) -> Curve | None:
    """Return the loss in training by the steps that all runs recorded; None without two."""
    found: list[dict[int, float]] = [
        {
            record["step"]: record["loss"]
            for record in _records(run)
            if record["split"] == "train" and record.get("loss") is not None
        }
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, found)))
    if len(steps) < 2:
        return None
    means = [statistics.mean(each[step] for each in found) for step in steps]
    return Curve(np.array(steps, dtype=np.float64), np.array(means))


def _records(run: MeasuredRun) -> list[dict[str, Any]]:
    path = RunDirectory(run.run).metrics
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def cost_of(runs: Sequence[MeasuredRun]) -> Cost | None:
    """Return what training took; None if no run recorded it."""
    timed_runs = [run for run in runs if run.summary.get("timing")]
    if not timed_runs:
        return None
    timed = [run.summary for run in timed_runs]
    return Cost(
        statistics.median(each["timing"]["step_ms"] for each in timed),
        statistics.median(each["samples_per_s"] for each in timed),
        int(statistics.median(each["timing"]["peak_memory_bytes"] for each in timed)),
        timed[0]["device"],
        timed[0]["world_size"],
        max((run.runs_at_once for run in timed_runs if run.runs_at_once is not None), default=None),
    )


def energy_of(run: MeasuredRun) -> Floats | None:
    """Return the share of the squares of W in its leading r directions, ``(d,)`` for r from 1 to the largest d.

    It is the mean over the tables, in which each counts as many times as it has rows, with rows weighted by their
    frequency if the run's data set can be read. None if the tables cannot be read, with a warning.
    """
    try:
        tables = spectrum_of(run.run)["tables"]
    except UserError as error:
        print_warning(f"no spectrum of {run.run}: {error}")
        return None
    most = max(table["embedding_dim"] for table in tables)
    total, rows = np.zeros(most), 0
    for table in tables:
        squares = np.square((table["weighted"] or table["plain"])["singular_values"])
        if squares.sum() > 0:
            shares = np.cumsum(squares) / squares.sum()
            total += table["num_embeddings"] * np.append(shares, np.ones(most - len(shares)))
            rows += table["num_embeddings"]
    return total / rows if rows else None
