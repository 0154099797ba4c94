"""Shows a plan as a self-contained HTML page."""

import html
from typing import Any

from mlet_dist.embeddings.planning.cost_model import gigabytes
from mlet_dist.pages.charts import chart, inline_svg, with_title
from mlet_dist.pages.page_shell import INK, SERIES, chart_section, key, page, paragraphs, swatch, table
from mlet_dist.planner.budgets import budget_lines
from mlet_dist.planner.plan_report import (
    COST_CAPTION,
    MEMORY_CAPTION,
    configurations_table,
    facts,
    headline,
    kinds_of,
    ranks_table,
    short_ranks,
)

_RANK_CHARACTERS = 18  # of a list of ranks beside a bar
_BAR, _FRAME = 0.26, 1.0  # inches of height


def html_page(plan: dict[str, Any]) -> str:
    """Return the page: whether the plan fits, the memory of the ranks as bars, and all numbers in tables."""
    compression = plan.get("compression")
    shortage = [] if plan["shortage"] is None else [f"does not fit: {plan['shortage']}"]
    summary = [*shortage, headline(plan), *plan["summary"], *([] if compression is None else compression["summary"])]
    known = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts(plan))
    budgets = ""
    if compression is not None:
        budgets = f"<h2>Budgets</h2>\n<pre>{html.escape(chr(10).join(budget_lines(compression)))}</pre>"
    title = f"Memory by rank: {plan['world_size']:,} x {plan['device']['name']}"
    body = f"""<div class="callout">{paragraphs(*summary)}</div>
{key([(kind, swatch(colour)) for kind, colour in zip(kinds_of(plan), SERIES, strict=False)])}
{chart_section("Memory of each rank", _bars(plan), "Upright lines: the memory for the model, and that of the device.")}
<h2>Memory</h2>
{paragraphs(MEMORY_CAPTION)}
{table(*ranks_table(plan))}
<h2>Step</h2>
<dl>{known}</dl>
<h2>Configurations</h2>
{paragraphs(COST_CAPTION)}
{table(*configurations_table(plan))}
{budgets}"""
    return page(title, body)


def _bars(plan: dict[str, Any]) -> str:
    """Return a bar for each group of equal ranks, of its kinds of memory one after the other."""
    ranks, device = plan["ranks"], plan["device"]
    with chart(_FRAME + _BAR * len(ranks)) as (figure, axes):
        for place, each in enumerate(ranks):
            left = 0.0
            for kind, colour in zip(kinds_of(plan), SERIES, strict=False):
                (bar,) = axes.barh([place], [each[kind] / 1e9], left=[left], height=0.7, color=colour)
                with_title(bar, f"{kind}: {gigabytes(each[kind])}")
                left += each[kind] / 1e9
            host = f" + {gigabytes(each['host'])} on the host" if each["host"] else ""
            axes.text(left, place, f" {gigabytes(each['total'])}{host}", verticalalignment="center", fontsize=8)
        for limit in ("usable_memory", "memory"):
            axes.axvline(device[limit] / 1e9, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.set_xlim(0, 1.12 * max(device["memory"], *(each["total"] for each in ranks)) / 1e9)
        names = [f"{short_ranks(each['ranks'], _RANK_CHARACTERS)} ({each['count']})" for each in ranks]
        axes.set_yticks(range(len(ranks)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GB")
        return inline_svg(figure, "Memory of each rank by kind, beside that of the device")
