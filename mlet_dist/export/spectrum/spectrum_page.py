"""Shows spectra as a self-contained HTML page, with a chart for each table."""

from typing import Any

import numpy as np

from mlet_dist.export.spectrum.spectrum_report import NOTE, short, summary, weighting, width_of
from mlet_dist.pages.charts import chart, inline_svg, with_title
from mlet_dist.pages.page_shell import PAGE, SERIES, SOFT, chart_section, key, page, paragraphs, swatch, table

_DECADES = 4  # of all charts; values below have less than 1e-8 of the energy of the largest
_MAX_DOTS = 64  # tables with more columns are drawn as lines only
_HEIGHT = 2.5
_PLAIN, _WEIGHTED = SERIES[0], SERIES[1]


def html_page(result: dict[str, Any]) -> str:
    """Return the result of ``spectrum_of`` as an HTML page: a chart for each table, and all numbers in a table."""
    gain = result["recipe_gain"]
    entries = [("unweighted", swatch(_PLAIN))]
    if result["data"] is not None:
        entries.append(("weighted by row frequency", swatch(_WEIGHTED)))
    charts = "\n".join(_section(each) for each in result["tables"])
    about = (
        "Each chart shows the singular values of W relative to the largest, on a logarithmic scale. A hollow point "
        f"marks a value below the scale; values below {result['floor']:.0e} cannot be distinguished from zero. "
        f"{weighting(result)} The dashed line is behind the fewest d with a loss of at most 0.1."
    )
    recipe = [] if gain is None else [f"kσ² of the recipe: {gain:.4g}."]
    explained = (
        "Effective rank: exp of the entropy of s / sum(s). Stable rank: squared Frobenius norm divided by squared "
        "spectral norm. 90% and 99%: number of dimensions that contain this share of sum(s²). Loss: relative Frobenius "
        "error of the best projection to d dimensions, with a projection for each weighting. Gains: the smallest and "
        "the largest eigenvalue of W2ᵀW2, by which W2 multiplies gradients under SGD. Balance: ||W1ᵀW1 - W2W2ᵀ|| "
        "relative to the larger of the two."
    )
    body = f"""<div class="callout">{paragraphs(NOTE)}</div>
{paragraphs(about, *recipe)}
{key(entries)}
<div class="charts">
{charts}
</div>
<h2 id="numbers">Numbers</h2>
{table(*summary(result))}
{paragraphs(explained)}"""
    return page(f"Spectrum of {result['source']} ({len(result['tables'])} tables)", body)


def _section(found: dict[str, Any]) -> str:
    d, plain, suggested = found["embedding_dim"], found["plain"], found["suggested"]
    caption = f"effective rank {plain['effective_rank']:.3g}, stable rank {plain['stable_rank']:.3g}"
    if suggested["embedding_dim"] < d:
        caption += f"; d = {suggested['embedding_dim']}: loss {suggested['loss']:.2g}"
        caption += "" if suggested["weighted_loss"] is None else f", weighted loss {suggested['weighted_loss']:.2g}"
    sizes = f"{found['num_embeddings']:,} × {d}" + (f", k = {width_of(found)}" if width_of(found) else "")
    return chart_section(f"{found['name']}: {sizes}", _chart(found), caption)


def _chart(found: dict[str, Any]) -> str:
    d, suggested = found["embedding_dim"], found["suggested"]["embedding_dim"]
    spectra = [(found["plain"], _PLAIN)] + ([] if found["weighted"] is None else [(found["weighted"], _WEIGHTED)])
    with chart(_HEIGHT) as (figure, axes):
        for spectrum, colour in spectra:
            values = np.array(spectrum["singular_values"])
            if not values[0]:
                axes.text(0.5, 0.5, "all zero", color=colour, transform=axes.transAxes, horizontalalignment="center")
                continue
            below = values < values[0] * 10.0**-_DECADES
            shown, at = np.maximum(values / values[0], 10.0**-_DECADES), np.arange(1, len(values) + 1)
            (line,) = axes.plot(at, shown, color=colour, linewidth=1.2)
            with_title(line, f"effective rank {short(spectrum['effective_rank'])}")
            if d <= _MAX_DOTS:
                axes.plot(at[~below], shown[~below], marker="o", markersize=3, color=colour, linestyle="none")
            axes.plot(at[below], shown[below], marker="o", markersize=3, color=colour, markerfacecolor=PAGE,
                      linestyle="none")  # fmt: skip
        if suggested < d:
            axes.axvline(suggested + 0.5, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.set_ylim(10.0**-_DECADES / 1.6, 1.6)
        axes.set_xlim(0.5, d + 0.5)
        axes.set_xticks(sorted({1, *(round(1 + (d - 1) * part / 4) for part in range(5))}))
        axes.minorticks_off()
        return inline_svg(figure, f"singular values of {found['name']}")
