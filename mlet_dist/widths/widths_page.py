"""Shows what compression did to the tables of a run as a self-contained HTML page, for any screen and for paper."""

import html
from typing import Any

from mlet_dist.pages.page_shell import FILL, VARIABLES, chart_section, key, page
from mlet_dist.widths.plots import COLOUR, bars, lines, opacities, sizes
from mlet_dist.widths.widths_report import size_lines

_STYLE = f"""\
.key i {{ background: {VARIABLES[FILL]} }} .key b {{ display: block; height: 100%; background: {VARIABLES[COLOUR]} }}
"""


def html_page(result: dict[str, Any]) -> str:
    """Return the page: bytes, widths of all tables, what moved and when, and each table.

    Args:
        result: of ``widths_of``.
    """
    opacity = opacities([each["width"] for each in result["widths"]])
    facts = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in size_lines(result))
    widths = key(
        (f"{width} columns" if width else "none", f'<i><b style="opacity: {shown:.2f}"></b></i>')
        for width, shown in opacity.items()
        if any(each["width"] == width for each in result["widths"])
    )
    when = "at the start" if result["interval"] else "chosen before training"
    unfinished = "" if result["finished"] else '<p class="note">The run has not finished.</p>'
    tables = "\n".join(_section(result, table, opacity) for table in result["tables"])
    over_time = "; lines: share of the rows that have columns" if result["history"] else ""
    body = f"""{unfinished}<dl><dt>policy</dt><dd>{result["policy"]}</dd>{facts}</dl>
<h2>All tables</h2>
{widths}
<div class="charts">
{chart_section(f"Widths, {when}", bars(result["widths"], opacity, "all tables"))}
{chart_section("Memory of all ranks", _memory(result))}
{_moves(result, opacity)}</div>
<h2>By table</h2>
<p class="note">Bars: rows and lookups of the training split by width, {when}{over_time}.</p>
<div class="charts">
{tables}
</div>"""
    return page(f"Widths of the rows of {result['run']}", body, _STYLE)


def _memory(result: dict[str, Any]) -> str:
    """Return a plot of the tables beside single-layer tables, and beside the measured peak."""
    found = [
        ("single-layer tables", result["single_layer_training_bytes"]),
        ("budget", result["budget_bytes"]),
        ("tables in training", result["training_bytes"]),
    ]
    if result["rank_peak_memory_bytes"] is not None:
        found.append(("measured peak", sum(result["rank_peak_memory_bytes"])))
    return sizes(found, "bytes of tables in training, and the measured peak")


def _moves(result: dict[str, Any], opacity: dict[int, float]) -> str:
    """Return the plots of rows that move, of all tables."""
    history = result["history"]
    if not history:
        return ""
    found = ""
    if history[-1]["kept_by_width"]:
        by_width = [
            (
                str(width),
                [(each["step"], each["kept_by_width"][width]) for each in history if width in each["kept_by_width"]],
                max(0.35, opacity.get(width, 1.0)),
            )
            for width in history[-1]["kept_by_width"]
        ]
        plot = lines(by_width, "share of rows with columns by the width that they began with", percent=True)
        caption = "By the width that they began with because of their counts."
        found += chart_section("Rows that have columns", plot, caption) + "\n"
    moves = [("", [(each["step"], each["moves_per_pass"]) for each in history], 1.0)]
    what = "Chunks" if result["chunks"] else "Rows"
    plot = lines(moves, f"{what.lower()} moved in a pass", percent=False)
    return found + chart_section(f"{what} moved in a pass", plot, "Mean since the record before.") + "\n"


def _section(result: dict[str, Any], table: dict[str, Any], opacity: dict[int, float]) -> str:
    name, found = table["name"], bars(table["widths"], opacity, table["name"])
    kept = [(each["step"], each["kept"][name]) for each in result["history"] if name in each["kept"]]
    if kept:
        found += lines([(f"{kept[-1][1]:.0%}", kept, 1.0)], f"{name}: share of rows with columns", percent=True)
    return chart_section(f"{name}: {table['num_embeddings']:,} rows", found)
