"""How the series of a chart are told apart: by colour, by the fill of their marks, and by the dashes of their lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlet_dist.pages.page_shell import INK, PAGE, SERIES, VARIABLES

# How marks are filled, and dashes and gaps in widths of the line.
_FILLS = ("full", "none", "left", "right", "top", "bottom", "edged", "dark")
_DASHES: tuple[tuple[float, ...], ...] = (
    (), (3, 2), (1, 1.5), (6, 1.5, 1, 1.5), (8, 2), (4, 1.5, 1, 1.5, 1, 1.5), (1, 4), (8, 2, 3, 2),
)  # fmt: skip
LOOKS = len(SERIES) * len(_FILLS)
"""How many series have looks of their own."""

_RADIUS = 4  # of a mark in the key of a page
_HALVES = {  # the half of a circle around 0, 0
    "left": "M0 -{r}A{r} {r} 0 0 0 0 {r}Z",
    "right": "M0 -{r}A{r} {r} 0 0 1 0 {r}Z",
    "top": "M-{r} 0A{r} {r} 0 0 1 {r} 0Z",
    "bottom": "M-{r} 0A{r} {r} 0 0 0 {r} 0Z",
}


@dataclass(frozen=True)
class Look:
    """How charts show a series.

    Attributes:
        colour: one of ``SERIES``.
        style: which fill and which dashes.
        number: beside its marks and in the key, where there are more series than looks; otherwise None.
    """

    colour: str
    style: int = 0
    number: int | None = None

    @property
    def marks(self) -> dict[str, Any]:
        """Arguments of matplotlib for marks."""
        fill = _FILLS[self.style]
        faces: dict[str, dict[str, Any]] = {
            "none": {"markerfacecolor": PAGE},
            "edged": {"markeredgecolor": INK},
            "dark": {"markerfacecolor": INK},
        }
        if fill in _HALVES:
            return {"color": self.colour, "fillstyle": fill, "markerfacecoloralt": PAGE}
        return {"color": self.colour, **faces.get(fill, {})}

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib for lines."""
        dashes = _DASHES[self.style]
        return {"color": self.colour, "linestyle": (0, dashes) if dashes else "solid"}

    @property
    def svg(self) -> str:
        """A line and a mark, for the key of a page."""
        fill, colour = _FILLS[self.style], VARIABLES[self.colour]
        inner = {"full": colour, "edged": colour, "dark": VARIABLES[INK]}.get(fill, VARIABLES[PAGE])
        edge = VARIABLES[INK] if fill == "edged" else colour
        dashes = " ".join(f"{1.5 * each:g}" for each in _DASHES[self.style])
        half = f'<path d="{_HALVES[fill].format(r=_RADIUS)}" fill="{colour}"/>' if fill in _HALVES else ""
        return (
            f'<svg viewBox="-22 -6 44 12"><path d="M-22 0H22" stroke="{colour}" stroke-width="1.5"'
            + (f' stroke-dasharray="{dashes}"' if dashes else "")
            + f'/><circle r="{_RADIUS}" fill="{inner}" stroke="{edge}" stroke-width="1.5"/>{half}</svg>'
        )


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Return how each series is shown: no two the same, or with numbers if there are more than ``LOOKS``."""
    numbered = len(names) > LOOKS
    return {
        name: Look(SERIES[index % len(SERIES)], index // len(SERIES) % len(_FILLS), index + 1 if numbered else None)
        for index, name in enumerate(names)
    }


def named(names: Sequence[str]) -> list[tuple[str, Look]]:
    """Return the entries of a key: each name, with its number if it has one, and its look."""
    return [(name if look.number is None else f"{look.number}: {name}", look) for name, look in looks(names).items()]
