"""What to choose, by a rule that is stated on the page: how many times smaller at equal quality, and what is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlet_dist.quality.paired_bootstrap import CONFIDENCE, Difference
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement, difference_of_outputs

MARGIN = 0.001
"""The LogLoss by which an output may be above the reference and still count as equal."""

Verdict = Literal["holds", "unclear", "fails"]


@dataclass(frozen=True)
class Ratio:
    """How many times smaller than the reference the smallest output of equal quality is, on a split.

    Attributes:
        value: by the differences that were measured, without regard to their intervals.
        low: of the interval: the same under each draw of rows and seeds.
        high: its upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recommendation:
    """What the rule says.

    Attributes:
        smallest: the smallest output of equal quality; None if none is smaller than the reference.
        verdict: whether it holds on the split of the results; None without such a split, or without ``smallest``.
        times_smaller: of all outputs; None without scores.
        by_mean: the smallest output whose mean difference on the split by which the recommendation chooses is within
            the margin, without regard to its interval; None without such a split beside that of the results, or
            without scores. Its difference on the split of the results is not better for having been chosen.
        better: arms that are better than the reference at no more bytes, the best first.
        of_controls: arms of MLET that are better than the reference, and not certain to be better than their control:
            of which all runs may have failed.
    """

    smallest: MeasuredOutput | None
    verdict: Verdict | None
    times_smaller: Ratio | None
    by_mean: MeasuredOutput | None
    better: Sequence[MeasuredOutput]
    of_controls: Sequence[MeasuredOutput]


def recommend(found: Measurement, margin: float = MARGIN) -> Recommendation:
    """Apply the rule.

    Args:
        found: all arms.
        margin: in LogLoss, above 0.
    """
    reference = found.reference_output
    smaller = [
        each
        for each in found.outputs
        if each.served_bytes < reference.served_bytes and _upper(each, found.choice_split) < margin
    ]
    smallest = min(
        smaller,
        # Of outputs of one size, the reference's own asks for nothing new, and then the one that is cheapest to train.
        key=lambda each: (
            each.served_bytes,
            each.arm != found.reference,
            each.training_bytes,
            _upper(each, found.choice_split),
        ),
        default=None,
    )
    better: list[MeasuredOutput] = []
    of_controls: list[MeasuredOutput] = []
    for each in found.outputs:
        is_rival = each == found.float_output(each.arm) and each.arm != found.reference
        if is_rival and each.served_bytes <= reference.served_bytes and _upper(each, found.choice_split) < 0:
            (better if _beats_control(each, found) else of_controls).append(each)
    return Recommendation(
        smallest,
        _verdict(smallest, found, margin),
        times_smaller(found, margin),
        _by_mean(found, margin),
        sorted(better, key=lambda each: _upper(each, found.choice_split)),
        of_controls,
    )


def times_smaller(found: Measurement, margin: float, outputs: Sequence[MeasuredOutput] | None = None) -> Ratio | None:
    """Return how many times smaller the smallest of outputs within the margin is, on the split of the results.

    It is 1 where none is smaller. None without scores.

    Args:
        found: all arms.
        margin: in LogLoss.
        outputs: those that are looked at; by default all.
    """
    reference, split = found.reference_output, found.result_split
    known = [
        (each.served_bytes, quality.difference.value, quality.draws)
        for each in (found.outputs if outputs is None else outputs)
        if (quality := each.loss(split)) is not None and quality.difference is not None and quality.draws is not None
    ]
    if not known:
        return None
    sizes = np.array([size for size, _, _ in known], dtype=np.float64)

    def ratio(differences: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
        fitting = np.where(differences < margin, sizes, np.inf).min(axis=-1)
        return np.maximum(1.0, reference.served_bytes / fitting)

    value = ratio(np.array([difference for _, difference, _ in known]))
    drawn = ratio(np.stack([draws for _, _, draws in known], axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Ratio(float(value), float(low), float(high))


def _by_mean(found: Measurement, margin: float) -> MeasuredOutput | None:
    """Return the smallest output within the margin by its mean difference on valid, of those with scores of both."""
    if found.result_split == found.choice_split:
        return None

    def known(output: MeasuredOutput, split: str) -> Difference | None:
        quality = output.loss(split)
        return None if quality is None else quality.difference

    within = [
        each
        for each in found.outputs
        if (difference := known(each, found.choice_split)) is not None
        and difference.value < margin
        and known(each, found.result_split) is not None
    ]
    return min(within, key=lambda each: (each.served_bytes, each.arm != found.reference), default=None)


def _upper(output: MeasuredOutput, split: str) -> float:
    """Return the upper end of the interval of a difference; infinity if it is not known."""
    quality = output.loss(split)
    if quality is None or quality.difference is None or np.isnan(quality.difference.high):
        return float("inf")
    return quality.difference.high


def _beats_control(output: MeasuredOutput, found: Measurement) -> bool:
    """Return whether an arm of MLET is certain to be better than its controls; False if one has no good run."""
    for control in found.controls.get(output.arm, ()):
        if control not in found.runs:
            return False
        difference = difference_of_outputs(output, found.float_output(control), found.choice_split)
        if difference is None or not difference.high < 0:
            return False
    return True


def _verdict(smallest: MeasuredOutput | None, found: Measurement, margin: float) -> Verdict | None:
    if smallest is None or found.result_split == found.choice_split:
        return None
    quality = smallest.loss(found.result_split)
    if quality is None or quality.difference is None:
        return None
    if quality.difference.high < margin:
        return "holds"
    return "fails" if quality.difference.low > margin else "unclear"
