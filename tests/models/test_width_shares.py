"""The shares of rows and lookups that a choice of widths keeps."""

import numpy as np
import pytest

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.models.width_shares import WidthShare, describe_shares, total_lookups, width_shares


def test_tables_are_weighted_by_their_rows_and_lookups() -> None:
    counts = {"a": np.array([50, 30, 10, 10]), "b": np.array([200, 50, 25, 15, 5, 5])}
    ranges = {"a": (RowRange(2, 16, 0.8), RowRange(2, 0, 0.2)), "b": (RowRange(1, 32, 2 / 3), RowRange(5, 16, 1 / 3))}
    shares = width_shares(ranges, total_lookups(counts))
    assert [each.width for each in shares] == [32, 16, 0]
    assert [each.rows for each in shares] == pytest.approx([0.1, 0.7, 0.2])
    assert [each.lookups for each in shares] == pytest.approx([200 / 400, 180 / 400, 20 / 400])


def test_the_line_names_every_width() -> None:
    assert describe_shares([WidthShare(8, 0.25, 0.5), WidthShare(0, 0.75, 0.5)]) == (
        "25.0% of the rows with 8 columns (50.0% of lookups), 75.0% of the rows with 0 columns (50.0% of lookups)"
    )
