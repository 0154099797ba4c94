"""Shows what compression did to the tables of a run as a self-contained HTML page, for any screen and for paper."""

import html
from typing import Any

from mlet_dist.widths.plots import bars, lines, opacities, sizes
from mlet_dist.widths.widths_report import size_lines

_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #fff; --rule: #d0d7de; --none: #e3e7eb;
  --stored: #1a5fb4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --page: #0d1117; --rule: #3d444d;
  --none: #262c34; --stored: #78aeff } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #333; --page: #fff; --rule: #bbb; --none: #e3e7eb;
  --stored: #1a5fb4 } }
body { font: 14px/1.45 sans-serif; margin: 16px auto; padding: 0 14px; max-width: 1120px; color: var(--ink);
  background: var(--page); print-color-adjust: exact; -webkit-print-color-adjust: exact }
h1 { font-size: 18px; overflow-wrap: anywhere } h2 { font-size: 15px; margin: 26px 0 8px }
h3 { font-size: 13px; margin: 0 0 6px; overflow-wrap: anywhere } p { max-width: 65em; margin: 6px 0 }
h2, .note, .key { break-after: avoid }
small, .note { color: var(--soft); font-weight: normal }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 } dt { color: var(--soft) }
dd { margin: 0; font-variant-numeric: tabular-nums }
@media (max-width: 560px) { dl { grid-template-columns: 1fr } dd { margin-bottom: 6px } }
.key span { margin-right: 14px; white-space: nowrap } .key i { display: inline-block; width: 14px; height: 14px;
  margin-right: 5px; vertical-align: -2px; background: var(--none) }
.key b { display: block; height: 100%; background: var(--stored) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 12px }
.plots section { border: 1px solid var(--rule); border-radius: 4px; padding: 8px; min-width: 0; break-inside: avoid }
svg { width: 100%; height: auto; display: block; font-variant-numeric: tabular-nums } svg text { fill: var(--ink) }
svg text.on { fill: var(--page) } .none { fill: var(--none) } .stored, .size { fill: var(--stored) }
.none, .stored { stroke: var(--page) } .grid { stroke: var(--rule) }
.line { fill: none; stroke: var(--stored); stroke-width: 2 } .dot { fill: var(--stored) }"""


def html_page(result: dict[str, Any]) -> str:
    """Return the page: bytes, widths of all tables, what moved and when, and each table.

    Args:
        result: of ``widths_of``.
    """
    title = html.escape(f"Widths of the rows of {result['run']}")
    opacity = opacities([each["width"] for each in result["widths"]])
    facts = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in size_lines(result))
    key = "".join(
        f'<span><i><b style="opacity: {shown:.2f}"></b></i>{f"{width} columns" if width else "none"}</span>'
        for width, shown in opacity.items()
        if any(each["width"] == width for each in result["widths"])
    )
    moving = bool(result["history"])
    when = "at the start" if result["interval"] else "chosen before training"
    unfinished = "" if result["finished"] else '<p class="note">The run has not finished.</p>'
    tables = "\n".join(_section(result, table, opacity) for table in result["tables"])
    over_time = "; lines: share of the rows that have columns" if moving else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{_STYLE}
</style></head>
<body><h1>{title}</h1>
{unfinished}<dl><dt>policy</dt><dd>{result["policy"]}</dd>{facts}</dl>
<h2>All tables</h2>
<p class="key">{key}</p>
<div class="plots">
<section><h3>Widths <small>{when}</small></h3>{bars(result["widths"], opacity, "all tables")}</section>
<section><h3>Memory <small>of all ranks</small></h3>{_memory(result)}</section>
{_moves(result, opacity)}</div>
<h2>By table</h2>
<p class="note">Bars: rows and lookups of the training split by width, {when}{over_time}.</p>
<div class="plots">
{tables}
</div>
</body></html>
"""


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
        found += (
            "<section><h3>Rows that have columns <small>by the width that they began with because of their counts"
            f"</small></h3>{plot}</section>\n"
        )
    moves = [("", [(each["step"], each["moves_per_pass"]) for each in history], 1.0)]
    what = "Chunks" if result["chunks"] else "Rows"
    return found + (
        f"<section><h3>{what} moved in a pass <small>mean since the record before</small></h3>"
        f"{lines(moves, 'rows moved in a pass', percent=False)}</section>\n"
    )


def _section(result: dict[str, Any], table: dict[str, Any], opacity: dict[int, float]) -> str:
    name, found = table["name"], bars(table["widths"], opacity, table["name"])
    kept = [(each["step"], each["kept"][name]) for each in result["history"] if name in each["kept"]]
    if kept:
        found += lines([(f"{kept[-1][1]:.0%}", kept, 1.0)], f"{name}: share of rows with columns", percent=True)
    return f"<section><h3>{html.escape(name)} <small>{table['num_embeddings']:,} rows</small></h3>{found}</section>"
