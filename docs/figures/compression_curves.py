"""Draw quality against bytes from the results of benchmarks/compression_grid.py; ``make_figures.py`` writes the files.

Both figures show differences of test LogLoss from the single layer with the same seed: their means, and as bars their
standard deviations.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from compression_results import SINGLE, Record, at_chosen_rates, read, served  # noqa: E402
from figure import BORDER, MUTED, Figure  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compression" / "criteo.jsonl"

WIDTH, HEIGHT = 720, 640
LEFT, RIGHT, TOP, BOTTOM = 92, 20, 60, 76
LOWEST, HIGHEST, STEP = -0.001, 0.007, 0.001
GREY, RED, GREEN, ORANGE, VIOLET, BLUE, BROWN, PINK = (
    "#6e7781", "#d1242f", "#1a7f37", "#e16f24", "#6639ba", "#0969da", "#7d4e00", "#bf3989",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A line of the legend, and its points of bytes, difference and standard deviation."""

    label: str
    colour: str
    dash: str
    points: list[tuple[float, float, float]]


def training_bytes() -> str:
    """Draw LogLoss against bytes in training."""
    cells = at_chosen_rates(read(RESULTS))

    def curve(label: str, arms: Sequence[str], colour: str, dash: str = "") -> Curve:
        points = []
        for cell, runs in cells.items():
            if cell[0] in arms:
                share = next(iter(runs.values()))["training_share"]
                points.append((share, *_spread(_differences(runs, cells[SINGLE]))))
        return Curve(label, colour, dash, sorted(points))

    return _chart(
        "Criteo sample: test LogLoss and bytes in training",
        "bytes of all tables in training (d = 16: 100%)",
        [
            curve("chunks (FIITED)", ["chunks"], BROWN, "3 4"),
            curve("random widths 16, 8, 4", ["random"], PINK, "3 4"),
            curve("adaptive whole + hashed rows", ["hot_hashed"], RED, "7 4"),
            curve("adaptive 16, 8, 4", ["project"], BLUE, "7 4"),
            curve("whole rows by count", ["whole"], RED),
            curve("static 16, 8, 4", ["graded"], GREEN),
            curve("static 16, 8, 4 + shared row", ["graded_shared"], ORANGE),
            curve("static MLET + shared row", ["mlet_shared"], VIOLET),
            curve("static d = 4 + shared row", ["d4_shared"], GREY, "7 4"),
            curve("single layer, d = 16, 8, 4", ["single", "d8", "d4"], GREY),
        ],
        [(share, f"{share:.0%}") for share in (0.05, 0.1, 0.25, 0.5, 1.0)],
    )


def served_bytes() -> str:
    """Draw LogLoss against served bytes."""
    cells = at_chosen_rates(read(RESULTS))
    single = cells[SINGLE]

    def curve(label: str, arm: str, forms: Callable[[int], Sequence[str]], bits: int, colour: str) -> Curve:
        points = []
        for runs in (runs for (name, _), runs in cells.items() if name == arm):
            for form in forms(bits):
                found = served(runs, single, form)
                if found is not None:
                    points.append((found[0], *_spread(found[1])))
        return Curve(f"{label}, {'float32' if bits == 32 else f'int{bits}'}", colour, _DASHES[bits], sorted(points))

    def pruned(bits: int) -> list[str]:
        shares = ("0.5", "0.35", "0.25", "0.15", "0.1", "0.05")
        return [f"plain/{bits}", *(f"count/{share}/{bits}" for share in shares)]

    def mixed(bits: int) -> list[str]:
        return [f"mixed/{bits}"]

    return _chart(
        "Criteo sample: test LogLoss and served bytes",
        "bytes of all served tables",
        [
            *(curve("pruned by count", "single", pruned, bits, GREY) for bits in _DASHES),
            *(curve("16, 8, 4 + shared", "graded_shared", mixed, bits, ORANGE) for bits in _DASHES),
            curve("MLET + shared", "mlet_shared", mixed, 4, VIOLET),
        ],
        [(1e3 * size, f"{size} kB") for size in (50, 100, 200, 400)] + [(1e6, "1 MB"), (2e6, "2"), (4e6, "4")],
    )


_DASHES = {32: "", 8: "8 4", 4: "2 4"}


def _differences(runs: dict[int, Record], single: dict[int, Record]) -> list[float]:
    return [runs[seed]["test_logloss"] - single[seed]["test_logloss"] for seed in sorted(runs) if seed in single]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _chart(title: str, below: str, curves: Sequence[Curve], ticks: Sequence[tuple[float, str]]) -> str:
    figure = Figure(WIDTH, HEIGHT, f"{title}. Numbers are in the tables of the page.")
    sizes = [size for curve in curves for size, _, _ in curve.points] + [tick for tick, _ in ticks]
    first, last = math.log(min(sizes)) - 0.1, math.log(max(sizes)) + 0.1
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(size: float) -> float:
        return round(LEFT + (math.log(size) - first) / (last - first) * (right - LEFT), 1)

    def y(difference: float) -> float:
        return round(bottom - (difference - LOWEST) / (HIGHEST - LOWEST) * (bottom - TOP), 1)

    figure.text(LEFT, 36, title, 20, anchor="start", bold=True)
    for number in range(round((HIGHEST - LOWEST) / STEP) + 1):
        value = LOWEST + number * STEP
        figure.line(LEFT, y(value), right, y(value), MUTED if abs(value) < STEP / 2 else BORDER)
        figure.text(LEFT - 46, y(value) + 6, "0" if abs(value) < STEP / 2 else f"{value:+.3f}", 16)
    for size, text in ticks:
        figure.line(x(size), TOP, x(size), bottom, BORDER)
        figure.text(x(size), bottom + 24, text, 16)
    figure.text((LEFT + right) / 2, HEIGHT - 18, below, 18)
    for curve in curves:
        inside = [point for point in curve.points if point[1] <= HIGHEST]
        figure.path([(x(size), y(value)) for size, value, _ in _clipped(curve.points)], curve.colour, curve.dash)
        for size, value, deviation in inside:
            figure.dot(x(size), y(value), curve.colour)
            if deviation:
                ends = (max(value - deviation, LOWEST), min(value + deviation, HIGHEST))
                figure.path([(x(size), y(end)) for end in ends], curve.colour, width=1.5)
    figure.box(right - 296, TOP + 8, 288, 24 * len(curves) + 12, ("#ffffff", BORDER))
    for number, curve in enumerate(curves):
        line = TOP + 30 + 24 * number
        figure.path([(right - 286, line), (right - 250, line)], curve.colour, curve.dash)
        figure.dot(right - 268, line, curve.colour)
        figure.text(right - 242, line + 5, curve.label, 15, anchor="start")
    return figure.svg()


def _clipped(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Return the points, those above the chart moved along their line to its upper border."""
    found: list[tuple[float, float, float]] = []
    for index, (size, value, deviation) in enumerate(points):
        if value <= HIGHEST:
            found.append((size, value, deviation))
            continue
        neighbour = next((each for each in points[index + 1 :] if each[1] <= HIGHEST), None)
        if neighbour is not None and points[index + 1] is neighbour:
            part = (HIGHEST - neighbour[1]) / (value - neighbour[1])
            at = math.exp(math.log(neighbour[0]) + part * (math.log(size) - math.log(neighbour[0])))
            found.append((at, HIGHEST, 0.0))
    return found
