"""Render spectra as a text table, and as a self-contained HTML page with a plot for each table."""

import html
import math
from typing import Any

from mlet_dist.formatting import text_table

NOTE = (
    "Low rank is a diagnostic, not a goal: singular values show how a table uses its columns, not how well the model "
    "predicts. Train the smaller table and compare before you serve it."
)

_WIDTH, _HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 26
_DECADES = 4  # of all plots; values below have less than 1e-8 of the energy of the largest
_MAX_DOTS = 64  # tables with more columns are plotted as lines only
_PLAIN, _WEIGHTED, _CUT = "#4c72b0", "#dd8452", "#c44e52"
_STYLE = """\
body { font-family: sans-serif; margin: 16px; color: #222; background: #fff }
h1 { font-size: 18px } h2 { font-size: 13px; margin: 0 0 2px; overflow-wrap: anywhere } p { max-width: 60em }
.note { border-left: 4px solid #c44e52; padding: 6px 10px; background: #fbf1f1 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px }
.plots section { border: 1px solid #ddd; border-radius: 4px; padding: 8px; min-width: 0 }
.plots svg { width: 100%; height: auto; display: block } .plots p { font-size: 11px; margin: 2px 0 0; color: #444 }
.table { overflow-x: auto; margin-top: 20px }
table { border-collapse: collapse; font-size: 12px; white-space: nowrap }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left }
.key span { margin-right: 18px } .key i { display: inline-block; width: 18px; height: 0; border-top: 3px solid;
  vertical-align: middle; margin-right: 5px }"""


def report(result: dict[str, Any]) -> str:
    """Return the text that the command prints: a table with a line per embedding table, and notes."""
    names, lines = _summary(result)
    gain = result["recipe_gain"]
    return "\n".join(
        [
            *text_table(names, lines, left=1),
            "",
            _weighting(result),
            *([] if gain is None else [f"kσ² of the recipe: {gain:.4g}"]),
            NOTE,
        ]
    )


def _summary(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row of cells per table."""
    names = ["table", "n", "k", "d", ">0.1", ">0.01", ">0.001", "eff. rank", "stable rank", "90%", "99%"]
    names += ["weighted eff. rank", "90%", "99%", "d for loss 0.1", "loss", "weighted loss", "balance"]
    rows = []
    for each in result["tables"]:
        plain, weighted, suggested = each["plain"], each["weighted"], each["suggested"]
        weighted_cells = (
            ["-"] * 3 if weighted is None else [_short(weighted["effective_rank"]), *weighted["energy_dims"].values()]
        )
        rows.append(
            [
                each["name"],
                f"{each['num_embeddings']:,}",
                _width(each) or "-",
                each["embedding_dim"],
                *plain["counts"].values(),
                _short(plain["effective_rank"]),
                _short(plain["stable_rank"]),
                *plain["energy_dims"].values(),
                *weighted_cells,
                suggested["embedding_dim"],
                _short(suggested["loss"]),
                "-" if suggested["weighted_loss"] is None else _short(suggested["weighted_loss"]),
                "-" if each["balance"] is None else _short(each["balance"]["relative"]),
            ]
        )
    return names, [[str(cell) for cell in row] for row in rows]


def _width(table: dict[str, Any]) -> str:
    """Return k, or the widths of a table's ranges of rows, such as 64/16/0; empty for a single layer."""
    if "row_ranges" in table:
        return "/".join(str(each["hidden_dim"]) for each in table["row_ranges"])
    return str(table["hidden_dim"] or "")


def _weighting(result: dict[str, Any]) -> str:
    """Return a sentence on how rows were weighted."""
    if result["data"] is None:
        return f"Rows are not weighted by their frequency: {result['not_weighted']}."
    return f"Weighted numbers count each row as often as it occurs in the training split of {result['data']}."


def _short(value: float) -> str:
    return f"{value:.3g}"


def html_page(result: dict[str, Any]) -> str:
    """Return the result of ``spectrum_of`` as an HTML page: notes, a plot per table, and all numbers in a table."""
    title = html.escape(f"Spectrum of {result['source']} ({len(result['tables'])} tables)")
    gain = result["recipe_gain"]
    keys = f'<span><i style="color: {_PLAIN}"></i>unweighted</span>'
    if result["data"] is not None:
        keys += f'<span><i style="color: {_WEIGHTED}"></i>weighted by row frequency</span>'
    keys += f'<span><i style="color: {_CUT}; border-top-style: dashed"></i>fewest d with a loss of at most 0.1</span>'
    weighted = html.escape(_weighting(result))
    names, rows = _summary(result)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    plots = "\n".join(_plot(table) for table in result["tables"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
{_STYLE}
</style></head>
<body><h1>{title}</h1>
<p class="note">{html.escape(NOTE)}</p>
<p>Each plot shows the singular values of W relative to the largest, on a logarithmic scale. A hollow point marks a
value below the scale; values below {result["floor"]:.0e} cannot be distinguished from zero. {weighted} The
numbers are <a href="#numbers">below the plots</a>. {"" if gain is None else f"kσ² of the recipe: {gain:.4g}."}</p>
<p class="key">{keys}</p>
<div class="plots">
{plots}
</div>
<div class="table" id="numbers"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<p>Effective rank: exp of the entropy of s / sum(s). Stable rank: squared Frobenius norm divided by squared spectral
norm. 90% and 99%: number of dimensions that contain this share of sum(s²). Loss: relative Frobenius error of the best
projection to d dimensions, with a projection for each weighting. Balance: ||W1ᵀW1 - W2W2ᵀ|| relative to the larger of
the two.</p>
</body></html>
"""


def _plot(table: dict[str, Any]) -> str:
    d = table["embedding_dim"]
    parts = [_axes(d)]
    spectra = [(table["plain"], _PLAIN)] + ([] if table["weighted"] is None else [(table["weighted"], _WEIGHTED)])
    for spectrum, colour in spectra:
        parts.append(_curve(spectrum["singular_values"], d, colour))
    suggested = table["suggested"]
    if suggested["embedding_dim"] < d:
        x = _x(suggested["embedding_dim"] + 0.5, d)
        where = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
        parts.append(f'<line {where} stroke="{_CUT}" stroke-dasharray="4 3"/>')
    sizes = f"{table['num_embeddings']:,} × {d}" + (f", k = {_width(table)}" if _width(table) else "")
    plain = table["plain"]
    caption = f"effective rank {plain['effective_rank']:.3g}, stable rank {plain['stable_rank']:.3g}"
    if suggested["embedding_dim"] < d:
        caption += f"; d = {suggested['embedding_dim']}: loss {suggested['loss']:.2g}"
        caption += "" if suggested["weighted_loss"] is None else f", weighted loss {suggested['weighted_loss']:.2g}"
    name = html.escape(table["name"])
    return (
        f"<section><h2>{name} <small>{sizes}</small></h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="singular values of {name}" font-size="10">'
        f"{''.join(parts)}</svg><p>{html.escape(caption)}</p></section>"
    )


def _axes(d: int) -> str:
    parts = []
    for decade in range(0, -_DECADES - 1, -1):
        y = _y(decade)
        label = "1" if decade == 0 else f'10<tspan dy="-3" font-size="7">{decade}</tspan>'
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    for index in sorted({1, *(round(1 + (d - 1) * part / 4) for part in range(5))}):
        parts.append(f'<text x="{_x(index, d):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{index}</text>')
    return "".join(parts)


def _curve(values: list[float], d: int, colour: str) -> str:
    largest = values[0]
    if not largest:
        return f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle" fill="{colour}">all zero</text>'
    line, dots = [], []
    for index, value in enumerate(values, 1):
        below = value < largest * 10.0**-_DECADES
        x, y = _x(index, d), _y(-_DECADES if below else math.log10(value / largest))
        line.append(f"{x:.1f},{y:.1f}")
        if below or d <= _MAX_DOTS:
            fill = "#fff" if below else colour
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{fill}" stroke="{colour}"/>')
    return f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.5"/>{"".join(dots)}'


def _x(index: float, d: int) -> float:
    return _LEFT + 6 + (index - 1) / max(d - 1, 1) * (_WIDTH - _LEFT - _RIGHT - 12)


def _y(decade: float) -> float:
    return _TOP + 4 - decade / _DECADES * (_HEIGHT - _TOP - _BOTTOM - 4)
