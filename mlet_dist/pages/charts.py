"""Charts by matplotlib: inline SVG whose colours are the page's CSS variables, and PNG of the same figure."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mlet_dist.atomic_file import replaced_file
from mlet_dist.pages.page_shell import INK, PAGE, RULE, SERIES, SOFT, VARIABLES
from mlet_dist.pages.series_looks import Look

_WIDTH, _HEIGHT = 4.6, 3.1  # inches; text keeps its size on a phone, where a chart is as wide as the screen
_DPI = 200  # of PNG files
_TITLE_HEIGHT, _KEY_HEIGHT = 0.3, 0.2
_HALF_LINE, _LINE = 24, 56  # characters of a name in the key below a PNG, of two columns and of one
_TITLE = "title "
_SETTINGS: Any = {  # matplotlib's type is a literal of all its names
    "svg.fonttype": "none",
    "svg.hashsalt": "mlet",  # the same chart is the same text
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib; pages name the reader's own font in its place
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": PAGE,
    "axes.facecolor": PAGE,
    "savefig.facecolor": PAGE,
    "lines.linewidth": 1.6,
}


@contextmanager
def chart(height: float = _HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure with one pair of axes, to draw within the block; ``height`` is in inches, of a width of 4.6."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def with_title(artist: Artist, text: str) -> None:
    """Give an artist a text that a browser shows when the pointer is on it."""
    artist.set_gid(f"{_TITLE}{text}")


def inline_svg(figure: Figure, label: str) -> str:
    """Return a figure as SVG for a page; ``label`` says to a screen reader what it shows."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Nothing of these charts lies outside of their axes, and two charts of a page may clip by the same name.
    text = re.sub(r' clip-path="url\(#[^)]*\)"|<clipPath.*?</clipPath>', "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{html.escape(label)}">',
        text,
        count=1,
    )
    text = re.sub(rf'<g id="{_TITLE}([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif").replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


def _plain(name: str) -> str:
    """Return a name, shortened to a line, as text for matplotlib, to which dollar signs are those of formulas."""
    short = name if len(name) <= _LINE else f"{name[: _LINE - 1]}…"
    return short.replace("$", r"\$")


def save_png(figure: Figure, path: Path, title: str, entries: Sequence[tuple[str, Look]]) -> None:
    """Write a figure as PNG in the colours of a light page, with its title and key.

    Args:
        figure: the chart, to which both are added.
        path: of the file.
        title: above the chart.
        entries: of the key, as of ``series_looks.named``.

    Raises:
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(_SETTINGS):
        marks = [
            Line2D([], [], **(look.line | look.marks), marker="o", markersize=5, linewidth=1, label=_plain(name))
            for name, look in entries
        ]
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.02, horizontalalignment="left")
        columns = 2 if all(len(name) <= _HALF_LINE for name, _ in entries) else 1
        lines = -(-len(marks) // columns)
        figure.set_figheight(figure.get_figheight() + _TITLE_HEIGHT + _KEY_HEIGHT * lines)
        figure.legend(handles=marks, ncols=columns, loc="outside lower left", handlelength=3, handletextpad=0.4,
                      columnspacing=1)  # fmt: skip
        with replaced_file(path) as file:
            figure.savefig(file, format="png", dpi=_DPI)
