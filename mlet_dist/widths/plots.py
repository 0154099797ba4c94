"""Plots of the page of `mlet widths`, as SVG whose colours are the page's CSS variables."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 340  # of all plots, in CSS pixels on a phone
_BAR_LEFT, _BAR_HEIGHT, _BAR_STEP = 56, 20, 26
_SIZE_LEFT, _SIZE_RIGHT = 130, 56
_LABELLED = 24  # the narrowest part of a bar that has room for a number
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 130, 46, 40, 16, 22
_LINE_HEIGHT = 12
_MAX_DOTS = 40

Line = tuple[str, Sequence[tuple[int, float]], float]
"""A label, points of step and value, and opacity."""


def opacities(widths: Sequence[int]) -> dict[int, float]:
    """Return how opaque each width is drawn: the larger, the more; 0 for rows without columns."""
    own = [width for width in widths if width]
    return {width: 1 - 0.75 * index / max(1, len(own) - 1) for index, width in enumerate(own)} | {0: 0.0}


def bars(shares: Sequence[Mapping[str, Any]], opacity: Mapping[int, float], label: str) -> str:
    """Return two bars: the shares of rows and of lookups by width."""
    parts = []
    scale = WIDTH - _BAR_LEFT - 2
    for number, what in enumerate(("rows", "lookups")):
        x, y = float(_BAR_LEFT), 2 + number * _BAR_STEP
        parts.append(_text(_BAR_LEFT - 6, y + 15, what, "end"))
        for each in shares:
            size, shown = each[what] * scale, opacity[each["width"]]
            box = f'x="{x:.1f}" y="{y}" width="{size:.2f}" height="{_BAR_HEIGHT}"'
            title = f"<title>{_columns(each['width'])}: {each[what]:.1%} of {what}</title>"
            parts.append(f'<rect class="none" {box}>{title}</rect>')
            if shown:
                parts.append(f'<rect class="stored" fill-opacity="{shown:.2f}" {box}>{title}</rect>')
            if size >= _LABELLED:
                name = "on" if shown > 0.6 else "off"
                parts.append(_text(x + size / 2, y + 14, str(each["width"]), "middle", name))
            x += size
    return _svg(parts, 2 * _BAR_STEP, f"{label}: shares of rows and of lookups by width")


def sizes(found: Sequence[tuple[str, int]], label: str) -> str:
    """Return a bar for each name and number of bytes, with the number."""
    parts = []
    scale = (WIDTH - _SIZE_LEFT - _SIZE_RIGHT) / max(1, *(size for _, size in found))
    for number, (name, size) in enumerate(found):
        y = 2 + number * _BAR_STEP
        parts.append(_text(_SIZE_LEFT - 6, y + 15, name, "end"))
        box = f'x="{_SIZE_LEFT}" y="{y}" width="{max(1.0, size * scale):.2f}" height="{_BAR_HEIGHT}"'
        parts.append(f'<rect class="size" {box}/>')
        parts.append(_text(_SIZE_LEFT + size * scale + 4, y + 15, f"{_short(size)}B", "start"))
    return _svg(parts, len(found) * _BAR_STEP, label)


def lines(found: Sequence[Line], label: str, *, percent: bool) -> str:
    """Return a plot of lines over steps, each with its label at its end; shares go from 0 to 100%."""
    steps = [step for _, points, _ in found for step, _ in points]
    first, last = (0, max(steps)) if percent else (min(steps), max(steps))
    largest = 1.0 if percent else _round_up(max(value for _, points, _ in found for _, value in points))
    right, bottom = WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - first) / max(1, last - first) * (right - _LEFT)
        return x, bottom - value / largest * (bottom - _TOP)

    parts = []
    for share in (0.0, 0.5, 1.0):
        _, y = place(first, share * largest)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        value = f"{share:.0%}" if percent else _short(share * largest).strip()
        parts.append(_text(_LEFT - 6, y + 4, value, "end"))
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(_text(place(step, 0)[0], bottom + 15, f"step {step:,}", anchor))
    ends = []
    for name, points, opacity in found:
        where = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline class="line" stroke-opacity="{opacity:.2f}" points="{path}"/>')
        if len(where) <= _MAX_DOTS:
            parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in where]
        ends.append((round(where[-1][1]), name))
    below = float("-inf")
    for y, name in sorted(ends, key=lambda end: end[0]):
        below = max(y + 4, below + _LINE_HEIGHT)
        parts.append(_text(right + 4, below, name, "start"))
    return _svg(parts, max(_HEIGHT, int(below) + 6), label)


def _round_up(value: float) -> float:
    """Return the next number of one digit and zeros, at least 1."""
    unit = 10.0 ** (len(str(int(value))) - 1)
    return max(1.0, -(-value // unit) * unit)


def _short(value: float) -> str:
    """Return a number in a few characters."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g} "


def _columns(width: int) -> str:
    return f"{width} columns" if width else "no columns"


def _text(x: float, y: float, text: str, anchor: str, name: str = "") -> str:
    kind = f' class="{name}"' if name else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}" font-size="12">'
        f"{''.join(parts)}</svg>"
    )
