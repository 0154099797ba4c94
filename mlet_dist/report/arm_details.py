"""What a report shows of each arm besides its quality: calibration, kinds of ids, learning, time, memory, spectra."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning
from mlet_dist.progress import Progress
from mlet_dist.quality.calibration import (
    ReliabilityBin,
    calibration,
    mean_bins,
    normalised_entropy,
    reliability,
)
from mlet_dist.quality.paired_bootstrap import Difference, difference_of, difference_over_seeds
from mlet_dist.quality.replicates import replicates_of
from mlet_dist.quality.score_metrics import Floats, Scores
from mlet_dist.quality.scores_file import read_scores, rows_with_label
from mlet_dist.report.frequency import class_weights, labels_of, shares_of
from mlet_dist.report.learning import Cost, Curve, cost_of, curve_of, energy_of
from mlet_dist.report.measured_arms import Measurement


@dataclass(frozen=True)
class ArmDetails:
    """What is known of an arm with float32 tables, on the split of the results.

    Attributes:
        normalised_entropy: mean over the seeds; None without scores, as the next two.
        calibration: the sum of predictions divided by that of labels, mean over the seeds.
        reliability: of each bin, the mean over the seeds.
        by_class: for each class of ids, LogLoss and AUC and their differences from the reference, mean over the seeds.
        curve: the loss in training.
        cost: time and memory.
        energy: of the first seed, the share of the squares of W in its leading directions.
    """

    normalised_entropy: float | None
    calibration: float | None
    reliability: list[ReliabilityBin]
    by_class: Mapping[str, Mapping[str, tuple[float, Difference]]]
    curve: Curve | None
    cost: Cost | None
    energy: Floats | None


@dataclass(frozen=True)
class Details:
    """Of all arms.

    Attributes:
        arms: by name.
        class_shares: of the split's lookups, by class of ids; empty if the data set could not be read.
    """

    arms: Mapping[str, ArmDetails]
    class_shares: Mapping[str, float]


def details_of(found: Measurement) -> Details:
    """Read what is known of all arms."""
    prefix = "" if found.label is None else f"{found.label}_"
    files = {arm: _scores(found, arm) for arm in found.runs}
    weights = _class_weights(found, files[found.reference], prefix)
    by_class = {name: _of_class(found, files, prefix, of_rows) for name, of_rows in weights.items() if of_rows.any()}
    arms = {}
    with Progress("report", len(found.runs), "arms") as progress:
        for arm, runs in found.runs.items():
            entropies, calibrations, bins = [], [], []
            for file in files[arm].values():
                scores = read_scores(file, prefix)  # of one run at a time: they may be of many rows
                entropies.append(normalised_entropy(scores))
                calibrations.append(calibration(scores))
                bins.append(reliability(scores))
            arms[arm] = ArmDetails(
                float(np.mean(entropies)) if entropies else None,
                float(np.mean(calibrations)) if calibrations else None,
                mean_bins(bins),
                {name: each[arm] for name, each in by_class.items() if arm in each},
                curve_of(runs),
                cost_of(runs),
                energy_of(min(runs, key=lambda run: run.seed)),
            )
            progress.update(1)
    return Details(arms, shares_of(weights))


def _scores(found: Measurement, arm: str) -> dict[int, Path]:
    """Return the files with the scores of an arm's float32 output by seed; empty if a seed has none."""
    output = found.float_output(arm).output
    paths = {run.seed: run.scores_of(found.result_split, output) for run in found.runs[arm]}
    if any(path is None for path in paths.values()):
        return {}
    return {seed: path for seed, path in paths.items() if path is not None}


def _class_weights(found: Measurement, files: Mapping[int, Path], prefix: str) -> dict[str, Floats]:
    """Return the weights of the scored rows for each class of ids; empty without scores or the data set."""
    if not files:
        return {}
    run = found.runs[found.reference][0]
    path = data_set_path(run.config.data.path)
    rows, scored = rows_with_label(files[run.seed], prefix), read_scores(files[run.seed], prefix).labels
    try:
        schema = DatasetSchema.load(path)
        if found.result_split not in schema.parts or (found.label is not None and found.label not in schema.labels):
            labels = np.zeros(0)
        else:
            labels = labels_of(path, schema, found.result_split, found.label)
        # A data set may have been prepared again since, with as many rows.
        if (len(rows) and rows[-1] >= len(labels)) or not np.array_equal(labels[rows], scored):
            print_warning(f"no metrics of rare and frequent ids: {path} has other rows than were scored")
            return {}
        weights = class_weights(path, schema, found.result_split)
    except UserError as error:
        print_warning(f"no metrics of rare and frequent ids: {error}")
        return {}
    return {name: each[rows] for name, each in weights.items()}


def _of_class(
    found: Measurement, files: Mapping[str, Mapping[int, Path]], prefix: str, of_rows: Floats
) -> dict[str, dict[str, tuple[float, Difference]]]:
    """Return the metrics of each arm with rows weighted by their ids of a class."""
    keys = [(arm, seed) for arm, of_seeds in files.items() for seed in of_seeds]
    rows = np.flatnonzero(of_rows)
    models = (
        Scores(each.logits[rows], each.labels[rows], each.weights[rows] * of_rows[rows])
        for each in (read_scores(files[arm][seed], prefix) for arm, seed in keys)
    )
    replicates = replicates_of(models)
    result: dict[str, dict[str, tuple[float, Difference]]] = {}
    for arm in dict.fromkeys(arm for arm, _ in keys):
        seeds = [seed for seed in files[arm] if seed in files[found.reference]]
        if not seeds:
            continue
        ours, theirs = ([keys.index((name, seed)) for seed in seeds] for name in (arm, found.reference))
        result[arm] = {}
        for metric, each in replicates.items():
            value, draws = difference_over_seeds(each, ours, theirs, np.random.default_rng(0))
            result[arm][metric] = float(each.values[ours].mean()), difference_of(draws, value)
    return result
