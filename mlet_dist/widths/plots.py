"""Charts of the page of `mlet widths`: widths by share of rows and of lookups, bytes, and shares over steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
from matplotlib.axes import Axes

from mlet_dist.formatting import size_text
from mlet_dist.pages.charts import chart, inline_svg, with_title
from mlet_dist.pages.page_shell import FILL, INK, PAGE, SERIES

COLOUR = SERIES[0]
_BAR, _FRAME = 0.26, 0.45  # inches of height
_LINES_HEIGHT = 1.7
_LABELLED = 0.08  # the narrowest part of a bar that has room for a number
_DARK = 0.6  # the opacity from which text on it has the colour of the page
_MAX_DOTS = 40
_LABEL_HEIGHT = 0.12  # of the axes of lines
_BESIDE = 1.25  # room for a number behind a bar

Line = tuple[str, Sequence[tuple[int, float]], float]
"""A label, points of step and value, and opacity."""


def opacities(widths: Sequence[int]) -> dict[int, float]:
    """Return how opaque each width is drawn: the larger, the more; 0 for rows without columns."""
    own = [width for width in widths if width]
    return {width: 1 - 0.75 * index / max(1, len(own) - 1) for index, width in enumerate(own)} | {0: 0.0}


def bars(shares: Sequence[Mapping[str, Any]], opacity: Mapping[int, float], label: str) -> str:
    """Return two bars: the shares of rows and of lookups by width."""
    names = ("rows", "lookups")
    with chart(_FRAME + _BAR * len(names)) as (figure, axes):
        for place, what in enumerate(names):
            left = 0.0
            for each in shares:
                size, shown = each[what], opacity[each["width"]]
                axes.barh([place], [size], left=[left], height=0.8, color=FILL)
                (bar,) = axes.barh([place], [size], left=[left], height=0.8, color=COLOUR, alpha=shown)
                with_title(bar, f"{_columns(each['width'])}: {size:.1%} of {what}")
                if size >= _LABELLED:
                    axes.text(left + size / 2, place, str(each["width"]), color=PAGE if shown > _DARK else INK,
                              fontsize=8, horizontalalignment="center", verticalalignment="center")  # fmt: skip
                left += size
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        _upright(axes, names)
        return inline_svg(figure, f"{label}: shares of rows and of lookups by width")


def sizes(found: Sequence[tuple[str, int]], label: str) -> str:
    """Return a bar for each name and number of bytes, with the number."""
    largest = max(1, *(size for _, size in found))
    with chart(_FRAME + _BAR * len(found)) as (figure, axes):
        for place, (_, size) in enumerate(found):
            axes.barh([place], [size], height=0.7, color=COLOUR)
            axes.text(size, place, f" {size_text(size)}", fontsize=8, verticalalignment="center")
        axes.set_xlim(0, _BESIDE * largest)
        axes.xaxis.set_visible(False)
        _upright(axes, [name for name, _ in found])
        return inline_svg(figure, label)


def lines(found: Sequence[Line], label: str, *, percent: bool) -> str:
    """Return a chart of lines over steps, each with its label at its end; shares go from 0 to 100%."""
    with chart(_LINES_HEIGHT) as (figure, axes):
        ends = []
        for name, points, opacity in found:
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= _MAX_DOTS else ""
            (line,) = axes.plot(steps, values, color=COLOUR, alpha=opacity, marker=marker, markersize=3)
            if name:
                with_title(line, name)
            ends.append((values[-1], name))
        if percent:
            axes.set_xlim(left=0)
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("step")
        for name, place in _apart(ends, _LABEL_HEIGHT * (axes.get_ylim()[1] - axes.get_ylim()[0])):
            axes.annotate(name, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                          fontsize=8, verticalalignment="center")  # fmt: skip
        return inline_svg(figure, label)


def _apart(ends: Sequence[tuple[float, str]], gap: float) -> list[tuple[str, float]]:
    """Return the names of lines, the lowest first, each with a place near its value and ``gap`` from the others.

    Values are at least 0, and so are places. None is above the largest value, unless there is no room below it.
    """
    ends = sorted(ends, key=lambda end: end[0])
    places: list[float] = []
    for value, _ in ends:
        places.append(max(value, places[-1] + gap) if places else value)
    top = max(ends[-1][0], gap * (len(ends) - 1))
    for index in reversed(range(len(ends))):
        places[index] = min(places[index], top)
        top = places[index] - gap
    return [(name, place) for (_, name), place in zip(ends, places, strict=True)]


def _upright(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _columns(width: int) -> str:
    return f"{width} columns" if width else "no columns"
