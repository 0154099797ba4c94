"""Names of any length and with any characters are shown as they are."""

import html
from pathlib import Path

import pytest

from mlet_dist.pages.charts import chart, inline_svg, save_png, with_title
from mlet_dist.pages.page_shell import paragraphs
from mlet_dist.pages.series_looks import named

NAMES = {
    "short": ["single", "mlet", "control of mlet"],
    "long": [
        "single",
        "single_compressed of MLET, d=16, k=64, 10%",
        "control of embedding_dim=16 hidden_dim=128",
        "x" * 200,
    ],
    "odd": ["$\\frac{$", "_hidden", "<b>", "a & b", 'it\'s "so"'],
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_key_of_a_picture_has_all_names_within_its_width(kind: str, tmp_path: Path) -> None:
    with chart() as (figure, axes):
        axes.plot([1, 2], [1, 2])
    save_png(figure, tmp_path / "chart.png", "title", named(NAMES[kind]))
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(NAMES[kind])
    extent = legend.get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1
    assert 0 <= extent.y0


def test_titles_and_labels_are_escaped_once() -> None:
    with chart() as (figure, axes):
        (line,) = axes.plot([1, 2], [1, 2])
        with_title(line, NAMES["odd"][3])
    text = inline_svg(figure, "a & b")
    assert "<title>a &amp; b</title>" in text
    assert f'aria-label="{html.escape("a & b")}"' in text


def test_code_in_paragraphs_is_marked_and_escaped() -> None:
    assert paragraphs("export it with `mlet export <RUN>`.", "a < b") == (
        "<p>export it with <code>mlet export &lt;RUN&gt;</code>.</p>\n<p>a &lt; b</p>"
    )
