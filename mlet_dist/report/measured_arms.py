"""How good each arm is in each of its outputs, and how it differs from the tuned single layer."""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlet_dist.config.parser import did_you_mean
from mlet_dist.errors import UserError, print_warning
from mlet_dist.formatting import signed
from mlet_dist.quality.paired_bootstrap import Difference, difference_of, difference_over_seeds, seed_noise
from mlet_dist.quality.replicates import METRICS, REPLICATES, Replicates, replicates_of
from mlet_dist.quality.score_metrics import Floats
from mlet_dist.quality.scores_file import read_scores
from mlet_dist.report.measured_runs import PLAIN, SPLITS, MeasuredRun


@dataclass(frozen=True)
class Quality:
    """A metric of an output on a split, over the seeds of its arm.

    Attributes:
        by_seed: the value of each seed.
        difference: the mean less that of the reference, over the seeds that both have if there are any, with an
            interval for other rows and other seeds; None without scores of both.
        draws: of the difference, ``(R,)``, for the same draws of rows for all outputs.
        replicates: the metric of each seed under these draws of rows, ``(R,)``; empty without scores.
    """

    by_seed: Mapping[int, float]
    difference: Difference | None = None
    draws: Floats | None = None
    replicates: Mapping[int, Floats] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class MeasuredOutput:
    """An output of an arm.

    Attributes:
        arm, output: their names.
        served_bytes: of its tables.
        training_bytes: the most that rows, W2 and optimizer state took in training.
        quality: by split and metric, as ``quality["test"]["logloss"]``.
    """

    arm: str
    output: str
    served_bytes: int
    training_bytes: int
    quality: Mapping[str, Mapping[str, Quality]]

    @property
    def is_float(self) -> bool:
        return self.output.partition("-")[0] == PLAIN

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.encoding}"

    @property
    def encoding(self) -> str:
        """The number format, and the variant of a compressed arm: fp32, int8-mixed, …"""
        return self.output.replace(PLAIN, "fp32", 1)

    def loss(self, split: str) -> Quality | None:
        return self.quality.get(split, {}).get("logloss")


@dataclass(frozen=True)
class Measurement:
    """All arms of a report.

    Attributes:
        reference: the arm that all are compared with, in float32.
        splits: of the data set that there are metrics of; the last one is that of the results.
        label: which of several labels the metrics are of; None for a data set of one.
        runs: of each arm, those that did not fail.
        faults: of each arm, why a run of a seed failed, by seed.
        controls: of each arm that has controls, their names, also of those whose runs all failed.
        outputs: of all arms, the largest first within an arm.
        rows: by split, the number of rows that its intervals are of; a split without intervals is not in it.
    """

    reference: str
    splits: tuple[str, ...]
    label: str | None
    runs: Mapping[str, Sequence[MeasuredRun]]
    faults: Mapping[str, Mapping[int, str]]
    controls: Mapping[str, Collection[str]]
    outputs: Sequence[MeasuredOutput]
    rows: Mapping[str, int]

    @property
    def result_split(self) -> str:
        return self.splits[-1]

    @property
    def choice_split(self) -> str:
        """The split by which the recommendation chooses, as tuning does: valid, if there are metrics of it."""
        return self.splits[0]

    @property
    def reference_output(self) -> MeasuredOutput:
        return self.float_output(self.reference)

    def float_output(self, arm: str) -> MeasuredOutput:
        """Return the float32 output of an arm; of a compressed arm with several variants, the smallest."""
        found = [each for each in self.outputs if each.arm == arm and each.is_float]
        return min(found, key=lambda each: each.served_bytes)


def measure(runs: Sequence[MeasuredRun], reference: str | None = None, label: str | None = None) -> Measurement:
    """Return the arms with their quality, from the scores of their runs where there are some.

    Args:
        runs: of all arms.
        reference: the arm to compare with; by default the single layer with the least LogLoss on the split valid, of
            those with scores if there are any.
        label: of several labels, the one whose metrics count; by default the first.

    Raises:
        UserError: all runs failed, there is no such arm or label or no single layer, arms have scores of different
            rows, or the runs of an arm have no float32 output in common.
    """
    good: dict[str, list[MeasuredRun]] = {}
    faults: dict[str, dict[int, str]] = {}
    for run in runs:
        if run.fault is None:
            good.setdefault(run.arm, []).append(run)
        else:
            faults.setdefault(run.arm, {})[run.seed] = run.fault
    if not good:
        raise UserError("all runs failed: they diverged, or their dense arch returns the same for all rows")
    prefix, label = _prefix_of(next(iter(good.values()))[0], label)
    all_runs = [run for of_arm in good.values() for run in of_arm]
    splits = tuple(split for split in SPLITS if all(f"{prefix}logloss" in _float(run, split) for run in all_runs))
    if not splits:
        raise UserError("the runs have no metrics of valid or test in common, so that there is nothing to compare")
    _warn_of_splits(good, splits, prefix)
    places = sorted({run.config.data.path for run in all_runs})
    if len(places) > 1 and any(run.scores is None for run in all_runs):
        print_warning(
            f"the runs are of the data sets {', '.join(places)}, and without predictions of single rows nothing shows "
            "whether these have the same rows; compare runs of the same data alone"
        )
    plain = {
        arm: statistics.mean(_float(run, splits[0])[f"{prefix}logloss"] for run in of_arm)
        for arm, of_arm in good.items()
    }
    reference = _reference(reference, good, plain)
    outputs = [output for arm, of_arm in good.items() for output in _outputs(arm, of_arm, splits, prefix)]
    rows: dict[str, int] = {}
    for split in splits:
        outputs, of_split = _with_differences(outputs, good, reference, split, prefix)
        rows |= {split: of_split} if of_split else {}
    controls: dict[str, set[str]] = {}
    for run in runs:
        if run.control_of is not None:
            controls.setdefault(run.control_of, set()).add(run.arm)
    return Measurement(reference, splits, label, good, faults, controls, outputs, rows)


def _warn_of_splits(good: Mapping[str, Sequence[MeasuredRun]], splits: Sequence[str], prefix: str) -> None:
    """Warn of a split that some arms have no metrics of, and that the report is without for this."""
    for split in SPLITS:
        without = [
            arm for arm, runs in good.items() if any(f"{prefix}logloss" not in _float(run, split) for run in runs)
        ]
        if split not in splits and len(without) < len(good):
            chosen = f"; {splits[0]} chooses what is recommended" if split == SPLITS[0] else ""
            print_warning(
                f"the report is without the split {split}, of which there are no metrics of {', '.join(without)}"
                f"{chosen}"
            )


def _prefix_of(run: MeasuredRun, label: str | None) -> tuple[str, str | None]:
    """Return what the names of a label's metrics begin with, and its name if there are several."""
    known = dict.fromkeys(
        metric.removesuffix("logloss").removesuffix("_")
        for split in SPLITS
        for metric in _float(run, split)
        if metric.endswith("logloss")
    )
    labels = [each for each in known if each]
    if not labels:
        if label is not None:
            raise UserError(f"--label {label}: the data set has one label alone; leave it out")
        return "", None
    if label is not None and label not in labels:
        raise UserError(f"--label {label}: the labels are {', '.join(labels)}")
    chosen = label or labels[0]
    return f"{chosen}_", chosen


def _float(run: MeasuredRun, split: str) -> Mapping[str, float]:
    """Return the metrics of a run's float32 output that are defined."""
    output = next((each for name, each in run.outputs.items() if name.partition("-")[0] == PLAIN), {})
    return {name: value for name, value in output.get(split, {}).items() if value is not None}


def _reference(wanted: str | None, good: Mapping[str, Sequence[MeasuredRun]], losses: Mapping[str, float]) -> str:
    if wanted is not None:
        if wanted not in good:
            raise UserError(
                f"--reference {wanted}: no arm with good runs has this name{did_you_mean(wanted, list(good))}; the "
                f"arms are {', '.join(good)}"
            )
        return wanted
    singles = [arm for arm, runs in good.items() if runs[0].kind == "single"]
    if not singles:
        raise UserError(
            f"no arm is a single layer, with which others are compared; name one of {', '.join(good)} by --reference"
        )
    with_scores = [arm for arm in singles if all(run.scores is not None for run in good[arm])]
    return min(with_scores or singles, key=lambda arm: losses[arm])


def _outputs(arm: str, runs: Sequence[MeasuredRun], splits: Sequence[str], prefix: str) -> list[MeasuredOutput]:
    """Return the outputs of an arm that all of its runs have."""
    known = dict.fromkeys(name for run in runs for name in run.outputs)
    names = [name for name in known if all(name in run.outputs for run in runs)]
    if partly := [name for name in known if name not in names]:
        print_warning(f"the report is without {', '.join(partly)} of {arm}, which not all of its runs were measured in")
    if not any(name.partition("-")[0] == PLAIN for name in names):
        raise UserError(
            f"the runs of {arm} were not measured in the same float32 output, of {', '.join(known)}; report the "
            "directories apart"
        )
    found = []
    for name in names:
        quality = {
            split: {
                metric: Quality({run.seed: _value(run.outputs[name][split], f"{prefix}{metric}") for run in runs})
                for metric in METRICS
            }
            for split in splits
            if all(f"{prefix}logloss" in run.outputs[name].get(split, {}) for run in runs)
        }
        bytes_of = [run.outputs[name]["served_bytes"] for run in runs]
        trained = max(run.summary["training_bytes_peak"] for run in runs)
        found.append(MeasuredOutput(arm, name, max(bytes_of), trained, quality))
    return sorted(found, key=lambda each: -each.served_bytes)


def _value(metrics: Mapping[str, float | None], name: str) -> float:
    """Return a metric; NaN if it is undefined, as AUC is for rows of one label."""
    value = metrics.get(name)
    return math.nan if value is None else value


def _with_differences(
    outputs: Sequence[MeasuredOutput],
    good: Mapping[str, Sequence[MeasuredRun]],
    reference: str,
    split: str,
    prefix: str,
) -> tuple[list[MeasuredOutput], int]:
    """Return the outputs with their differences from the reference on a split, and of how many rows these are.

    There are differences where there are scores of both; without any the number is 0.
    """
    places: dict[tuple[str, str], dict[int, int]] = {}
    files: list[Path] = []
    for output in outputs:
        paths = {run.seed: run.scores_of(split, output.output) for run in good[output.arm]}
        if all(path is not None for path in paths.values()) and split in output.quality:
            places[output.arm, output.output] = {seed: len(files) + index for index, seed in enumerate(paths)}
            files += [path for path in paths.values() if path is not None]
    base = next((key for key in reversed(places) if key[0] == reference and key[1].partition("-")[0] == PLAIN), None)
    if base is None:
        return list(outputs), 0
    try:
        replicates = replicates_of(read_scores(file, prefix) for file in files)
    except ValueError as error:
        raise UserError(f"the arms have scores of different rows of {split}: {error}; report them apart") from None
    found = []
    for output in outputs:
        own = places.get((output.arm, output.output))
        if own is None:
            found.append(output)
            continue
        first = next(iter(places[output.arm, name.output] for name in outputs if name.arm == output.arm
                          and (name.arm, name.output) in places))  # fmt: skip
        metrics = {}
        for metric, each in replicates.items():
            values, draws = _difference(each, own, places[base], each.values[list(first.values())])
            exact = {seed: float(each.values[index]) for seed, index in own.items()}
            replicates_of_seeds = {seed: each.draws[:, index] for seed, index in own.items()}
            metrics[metric] = Quality(exact, difference_of(draws, values), draws, replicates_of_seeds)
        found.append(dataclasses.replace(output, quality={**output.quality, split: metrics}))
    return found, len(read_scores(files[0], prefix))


def _difference(
    metric: Replicates, own: Mapping[int, int], base: Mapping[int, int], of_arm: Floats
) -> tuple[float, Floats]:
    """Return the difference of the means over seeds, and its draws: of rows, and of seeds by Student's t.

    The draws of seeds follow from the values of the arm's first output alone, so that they are the same for all outputs
    of an arm, and depend neither on names nor on the order of arms.
    """
    common = [seed for seed in own if seed in base]
    generator = np.random.default_rng(np.frombuffer(np.sort(of_arm).tobytes(), np.uint32))
    if common:
        return difference_over_seeds(metric, [own[seed] for seed in common], [base[seed] for seed in common], generator)
    ours, theirs = list(own.values()), list(base.values())
    rows = metric.draws[:, ours].mean(axis=1) - metric.draws[:, theirs].mean(axis=1)
    noise = sum(seed_noise(list(metric.values[each]), REPLICATES, generator) for each in (ours, theirs))
    return float(metric.values[ours].mean() - metric.values[theirs].mean()), rows + noise


def difference_of_outputs(first: MeasuredOutput, second: MeasuredOutput, split: str) -> Difference | None:
    """Return the difference in LogLoss of two outputs, paired by their own seeds; None without scores of both."""
    ours, theirs = first.loss(split), second.loss(split)
    if ours is None or theirs is None or not ours.replicates or not theirs.replicates:
        return None
    of_both = Replicates(
        np.array([each.by_seed[seed] for each in (ours, theirs) for seed in each.replicates]),
        np.stack([*ours.replicates.values(), *theirs.replicates.values()], axis=1),
    )
    own = {seed: index for index, seed in enumerate(ours.replicates)}
    others = {seed: len(own) + index for index, seed in enumerate(theirs.replicates)}
    value, draws = _difference(of_both, own, others, of_both.values[: len(own)])
    return difference_of(draws, value)


def difference_text(difference: Difference | None) -> str:
    """Return a difference with its interval; empty if it is not known."""
    if difference is None or math.isnan(difference.value):
        return ""
    return f"{signed(difference.value)} ({signed(difference.low)} to {signed(difference.high)})"


def budget_text(budget: float | str | None) -> str:
    """Return compression.budget: a share with three digits, or a number of bytes."""
    return f"{budget:.3g}" if isinstance(budget, float) else str(budget)
