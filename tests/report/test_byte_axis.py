"""The axis of bytes has labels whatever the sizes are."""

from pathlib import Path

import pytest

from mlet_dist.pages.charts import inline_svg
from mlet_dist.report.arm_details import details_of
from mlet_dist.report.figures import figures_of
from mlet_dist.report.measured_arms import measure
from tests.report.arms_on_disk import MadeUpArms


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ((4_205_568, 4_205_568), ["4.21 MB"]),
        ((4_000_000, 5_100_000), ["4 MB", "5.1 MB"]),
        ((3_800_000, 7_000_000), ["4 MB", "5 MB", "6 MB"]),
        ((1_000_000, 20_000_000), ["1 MB", "2 MB", "5 MB", "10 MB", "20 MB"]),
    ],
)
def test_sizes_of_the_served_tables_are_labelled(sizes: tuple[int, int], labels: list[str], tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path, rows=60)
    runs = made.arm("single", "single", 0.1, {"dcp": sizes[1]}, seeds=(0,))
    runs += made.arm("mlet", "mlet", 0.1, {"dcp": sizes[0]}, seeds=(0,))
    found = measure(runs)
    drawn = next(iter(figures_of(found, details_of(found), 0.001)))
    (axes,) = drawn.figure.axes
    inline_svg(drawn.figure, drawn.title)  # the labels are made as it is drawn
    assert [text.get_text() for text in axes.get_xticklabels()] == labels
