"""The charts of a report: quality against bytes, learning curves, kinds of ids, calibration, spectra."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import ArrayLike

from mlet_dist.formatting import size_text
from mlet_dist.pages.charts import chart, with_title
from mlet_dist.pages.page_shell import INK, SOFT
from mlet_dist.pages.series_looks import Look, looks
from mlet_dist.report.arm_details import Details
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement, difference_text

_BESIDE = 1.06  # of sizes of the last arm and the first
_MARKERS = {"fp32": "o", "fp16": "s", "int8": "^", "int4": "D"}


@dataclass(frozen=True)
class Drawn:
    """A chart of the report.

    Attributes:
        name: of its PNG file.
        title: above it.
        caption: what it shows.
        figure: the chart.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def front(outputs: Sequence[MeasuredOutput], split: str, size: Callable[[MeasuredOutput], int]) -> list[MeasuredOutput]:
    """Return the outputs that no other one beats in both size and LogLoss, by rising size."""
    found: list[MeasuredOutput] = []
    best = np.inf
    for each in sorted(outputs, key=lambda each: (size(each), _loss(each, split))):
        if _loss(each, split) < best:
            best = _loss(each, split)
            found.append(each)
    return found


def figures_of(found: Measurement, details: Details, margin: float) -> Iterator[Drawn]:
    """Yield the charts for which there are measurements."""
    of_arm = looks(list(found.runs))
    split = found.result_split
    known = [each for each in found.outputs if each.loss(split) is not None]
    yield Drawn(
        "served_bytes",
        f"Quality on {split} and served bytes",
        "Mean LogLoss over the seeds, with its standard deviation; lower is better. The line is the Pareto front; the "
        f"band is up to {margin:g} above the reference. Points are up to 3% beside their sizes, so that "
        "arms of one size can be told apart.",
        _against_bytes(found, known, of_arm, margin, lambda each: each.served_bytes, "bytes of the served tables"),
    )
    plain = [each for each in known if each.is_float]
    yield Drawn(
        "training_bytes",
        f"Quality on {split} and training bytes",
        "Rows, W2 and optimizer state, over all ranks; tables in float32.",
        _against_bytes(found, plain, of_arm, margin, lambda each: each.training_bytes, "bytes in training"),
    )
    if any(each.curve for each in details.arms.values()):
        yield Drawn(
            "learning_curves",
            "Learning curves",
            "Loss of the training split, mean over the seeds, by step.",
            _curves(details, of_arm),
        )
    if any(each.by_class for each in details.arms.values()):
        yield Drawn(
            "frequency",
            "Rare and frequent ids",
            f"Difference in LogLoss on {split} from the reference, for rows weighted by the number of their ids of a "
            "class; with 95% intervals for other rows and seeds.",
            _by_class(found, details, of_arm),
        )
    if any(each.reliability for each in details.arms.values()):
        yield Drawn(
            "calibration",
            "Calibration",
            f"Predicted probabilities less observed rates on {split}, in ten bins of equally many rows, "
            "mean over the seeds. 0 is best.",
            _calibration(details, of_arm),
        )
    if any(each.energy is not None for each in details.arms.values()):
        yield Drawn(
            "spectra",
            "Spectra",
            "Share of sum(s²) in the leading directions of W, rows weighted by their frequency, mean over the tables "
            "by their rows; of the first seed.",
            _spectra(details, of_arm),
        )


def _loss(output: MeasuredOutput, split: str) -> float:
    quality = output.loss(split)
    return np.inf if quality is None else quality.mean


def _against_bytes(
    found: Measurement,
    outputs: Sequence[MeasuredOutput],
    of_arm: Mapping[str, Look],
    margin: float,
    size: Callable[[MeasuredOutput], int],
    label: str,
) -> Figure:
    split = found.result_split
    with chart(3.4) as (figure, axes):
        base = _loss(found.reference_output, split)
        axes.axhspan(base, base + margin, color=SOFT, alpha=0.12, linewidth=0)
        axes.axhline(base, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        # Arms of the same size stand beside one another.
        last = max(1, len(of_arm) - 1)
        beside = {arm: _BESIDE ** (index / last - 0.5) for index, arm in enumerate(of_arm)}
        edge = front(outputs, split, size)
        edge_sizes = [beside[each.arm] * size(each) for each in edge]
        axes.plot(edge_sizes, [_loss(each, split) for each in edge], color=INK, linewidth=0.9)
        for arm, look in of_arm.items():
            own = sorted((each for each in outputs if each.arm == arm), key=size)
            sizes = [beside[arm] * size(each) for each in own]
            axes.plot(sizes, [_loss(each, split) for each in own], **look.line, alpha=0.45, linewidth=1)
            for each in own:
                quality = each.loss(split)
                assert quality is not None
                place = [beside[arm] * size(each)], [quality.mean]
                axes.errorbar(*place, yerr=quality.spread or 0.0, color=look.colour, linewidth=0.9, capsize=2)
                marker = _MARKERS[each.encoding.partition("-")[0]]
                (point,) = axes.plot(*place, **look.marks, marker=marker, markersize=4.5, linestyle="none")
                difference = difference_text(quality.difference)
                _add_number(axes, look, place[0], place[1])
                with_title(point, f"{each.name}: {size_text(size(each))}, LogLoss {quality.mean:.4f} {difference}")
        _byte_axis(axes, [size(each) for each in outputs])
        axes.set_xlabel(label)
        axes.set_ylabel(f"LogLoss, {split}")
        _marker_legend(axes, {each.encoding.partition("-")[0] for each in outputs})
        return figure


def _add_number(axes: Axes, look: Look, x: ArrayLike, y: ArrayLike) -> None:
    """Put the number of an arm, if it has one, beside the last of its marks."""
    if look.number is not None and np.size(x):
        last = float(np.ravel(x)[-1]), float(np.ravel(y)[-1])
        axes.annotate(str(look.number), last, (3, 2), textcoords="offset points", fontsize=5, color=look.colour)


def _marker_legend(axes: Axes, encodings: Collection[str]) -> None:
    """Add a legend of the markers: the key of the colours is that of all charts."""
    markers = {name: mark for name, mark in _MARKERS.items() if name in encodings}
    if len(markers) > 1:
        marks = [
            axes.plot([], [], marker=mark, color=SOFT, linestyle="none", markersize=4.5, label=name)[0]
            for name, mark in markers.items()
        ]
        axes.legend(handles=marks, ncols=len(marks), loc="upper center", bbox_to_anchor=(0.5, 1.1), handletextpad=0.1)


def _byte_axis(axes: Axes, sizes: Collection[int]) -> None:
    """Make the horizontal axis one of bytes, with at least one label; ``sizes`` are those of the points."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high / low < 300:  # few powers of ten to label
        bases = (1, 3) if high / low >= 60 else (1, 2, 5) if high / low >= 6 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        ticks = [base * 10.0**power for power in range(16) for base in bases]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) < 2:  # points of nearly one size
            shown = [min(sizes), max(sizes)] if max(sizes) > 1.1 * min(sizes) else [min(sizes)]
        axes.set_xticks(shown)


def _curves(details: Details, of_arm: Mapping[str, Look]) -> Figure:
    with chart() as (figure, axes):
        for arm, each in details.arms.items():
            if each.curve is not None:
                (line,) = axes.plot(each.curve.steps, each.curve.losses, **of_arm[arm].line, linewidth=1.2)
                _add_number(axes, of_arm[arm], each.curve.steps, each.curve.losses)
                with_title(line, arm)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, train")
        return figure


def _by_class(found: Measurement, details: Details, of_arm: Mapping[str, Look]) -> Figure:
    arms = [arm for arm, each in details.arms.items() if each.by_class and arm != found.reference]
    names = list(details.arms[found.reference].by_class)
    with chart() as (figure, axes):
        width = 0.8 / max(1, len(arms))
        for index, arm in enumerate(arms):
            for place, name in enumerate(names):
                _, difference = details.arms[arm].by_class[name]["logloss"]
                x = place + (index - (len(arms) - 1) / 2) * width
                # Of two arms that predict the same, rounding may put the value beside its interval.
                below, above = difference.value - difference.low, difference.high - difference.value
                around = [[max(0.0, below)], [max(0.0, above)]]
                axes.errorbar([x], [difference.value], yerr=around, color=of_arm[arm].colour, linewidth=1, capsize=2)
                (point,) = axes.plot([x], [difference.value], marker="o", **of_arm[arm].marks, markersize=4)
                _add_number(axes, of_arm[arm], [x], [difference.value])
                with_title(point, f"{arm}, {name} ids: {difference_text(difference)}")
        axes.axhline(0, color=SOFT, linewidth=0.8)
        shares = [f"{name}\n{details.class_shares[name]:.0%}" for name in names]
        axes.set_xticks(range(len(names)), shares)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("difference in LogLoss")
        return figure


def _calibration(details: Details, of_arm: Mapping[str, Look]) -> Figure:
    with chart() as (figure, axes):
        axes.axhline(0, color=SOFT, linewidth=0.8)
        for arm, each in details.arms.items():
            predicted = [part.predicted for part in each.reliability]
            excess = [part.predicted - part.observed for part in each.reliability]
            (line,) = axes.plot(predicted, excess, marker="o", markersize=3, **of_arm[arm].line, linewidth=1)
            _add_number(axes, of_arm[arm], predicted, excess)
            with_title(line, arm)
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("predicted - observed")
        return figure


def _spectra(details: Details, of_arm: Mapping[str, Look]) -> Figure:
    with chart() as (figure, axes):
        for arm, each in details.arms.items():
            if each.energy is not None:
                at = np.arange(1, len(each.energy) + 1)
                (line,) = axes.plot(at, each.energy, marker="o", markersize=3, **of_arm[arm].line, linewidth=1)
                _add_number(axes, of_arm[arm], at, each.energy)
                with_title(line, arm)
        axes.set_xlabel("directions")
        axes.set_ylabel("share of sum(s²)")
        axes.set_ylim(0, 1.03)
        return figure
