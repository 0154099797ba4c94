"""An SVG picture as plain text, without a plotting library, and the colours of all figures."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

FONT = "-apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
BACKGROUND = "#ffffff"
BORDER = "#d0d7de"
INK = "#1f2328"
MUTED = "#59636e"
ROWS = ("#cfe3fb", "#1f6feb")  # W1, and vectors of k columns
PROJECTION = ("#ffe2b3", "#b35c00")  # W2
VECTORS = ("#c9efd2", "#1a7f37")  # W, and vectors of d columns
PLAIN = ("#f2f4f7", "#8c959f")

Colours = tuple[str, str]


class Figure:
    """An SVG document of a fixed size, drawn from back to front.

    Args:
        width, height: in user units; the picture scales to the width of the page.
        title: what the figure shows, for screen readers.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="{BACKGROUND}" '
            f'stroke="{BORDER}"/>',
        ]
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colours: Colours, *, dashed: bool = False) -> None:
        """Draw a rectangle whose corner is at ``(x, y)``."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{colours[0]}" '
            f'stroke="{colours[1]}" stroke-width="1.5"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 18,
        *,
        anchor: str = "middle",
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """Write one line whose baseline is at ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 3) -> None:
        """Draw a horizontal or vertical arrow from the first point to the second."""
        head = 5 + 2 * width
        along_x, along_y = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        back_x, back_y = x2 - head * along_x, y2 - head * along_y
        side_x, side_y = head / 2 * abs(along_y), head / 2 * abs(along_x)
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{back_x:g}" y2="{back_y:g}" stroke="{colour}" '
            f'stroke-width="{width:g}"/>'
        )
        corners = f"{x2:g},{y2:g} {back_x + side_x:g},{back_y + side_y:g} {back_x - side_x:g},{back_y - side_y:g}"
        self._parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = BORDER) -> None:
        """Draw a thin line."""
        self._parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>')

    def path(self, points: Sequence[tuple[float, float]], colour: str, dash: str = "", width: float = 2.5) -> None:
        """Draw a line through points, dashed by an SVG pattern."""
        where = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        """Draw a point."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4.5" fill="{colour}"/>')

    def svg(self) -> str:
        """Return the document."""
        return "\n".join([*self._head, *self._parts, "</svg>", ""])
