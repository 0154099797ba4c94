"""A report as a self-contained HTML page, for any screen, in the dark and on paper."""

import html
from collections.abc import Sequence

from mlet_dist.pages.charts import inline_svg
from mlet_dist.pages.page_shell import chart_section, key, page, paragraphs, table
from mlet_dist.pages.series_looks import named
from mlet_dist.report.advice import advice, rule
from mlet_dist.report.arm_details import Details
from mlet_dist.report.figures import Drawn, front
from mlet_dist.report.measured_arms import Measurement
from mlet_dist.report.recommendation import Recommendation
from mlet_dist.report.report_text import (
    arms_table,
    classes_table,
    costs_table,
    faults,
    load_note,
    outputs_table,
    settings_table,
    sorted_outputs,
)

_COSTS = "Medians over the runs, beside the reference. Peak memory is that of a rank: of its GPU, or its process."


def html_page(
    found: Measurement, details: Details, chosen: Recommendation, drawn: Sequence[Drawn], margin: float
) -> str:
    """Return the page: the recommendation, the charts, and all figures in tables."""
    edge = front(found.outputs, found.result_split, lambda each: each.served_bytes)
    marked = [number for number, each in enumerate(sorted_outputs(found)) if each in edge]
    charts = "\n".join(
        chart_section(each.title, inline_svg(each.figure, f"{each.title}. {each.caption}"), each.caption)
        for each in drawn
    )
    names, rows = classes_table(found, details)
    classes = ""
    if rows:
        classes = (
            "<h2>Rare and frequent ids</h2>\n"
            + paragraphs(
                "Rows are weighted by the number of their ids of a class. By their counts in training, the frequent "
                "ids make up 80% of the lookups, the medium ones the next 15%, and the rare ones the rest."
            )
            + table(names, rows)
        )
    left_out = "".join(f"<li>{html.escape(line)}</li>" for line in faults(found))
    without = f"<h2>Left out of all means</h2>\n<ul>{left_out}</ul>" if left_out else ""
    of_label = "" if found.label is None else f" All metrics are of the label {found.label}."
    body = f"""<div class="callout">{paragraphs(*advice(found, chosen, margin))}</div>
{key((name, look.svg) for name, look in named(list(found.runs)))}
<div class="charts">
{charts}
</div>
<h2>The rule of the recommendation</h2>
{paragraphs(rule(found, margin) + of_label)}
<h2>Quality of the arms, with float32 tables</h2>
{paragraphs("Means over the seeds, with standard deviations, and differences with intervals. The reference is marked.")}
{table(*arms_table(found, details), marked=[list(found.runs).index(found.reference)])}
<h2>Time and memory in training</h2>
{paragraphs(_COSTS, *load_note(details))}
{table(*costs_table(found, details), marked=[list(found.runs).index(found.reference)])}
<h2>Outputs</h2>
{paragraphs("The smallest first; those of the Pareto front are marked.")}
{table(*outputs_table(found), marked=marked)}
{classes}
<h2>Settings</h2>
{table(*settings_table(found))}
{without}"""
    return page("What smaller tables cost", body)
