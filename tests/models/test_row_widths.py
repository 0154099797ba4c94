"""The widths of rows that static compression chooses."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlet_dist.config.sections import CompressionConfig, ModelConfig
from mlet_dist.embeddings.planning.cost_model import FLOAT
from mlet_dist.errors import UserError
from mlet_dist.models.row_widths import Sizes, default_widths, static_ranges

MODEL = ModelConfig(embedding_dim=16, hidden_dim=64)
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")


def counts_of(seed: int, tables: int = 5, largest: int = 4000) -> dict[str, np.ndarray[Any, Any]]:
    """Counts as of Zipf's law, in descending order but for row 0."""
    draw = np.random.default_rng(seed)
    found = {}
    for table in range(tables):
        rows = int(draw.integers(1, largest))
        counts = np.sort((1e5 / (1 + np.arange(rows)) ** draw.uniform(0.7, 1.3)).astype(np.int64) + 1)[::-1].copy()
        counts[0] = draw.integers(0, 50)
        found[f"t{table}"] = counts
    return found


def single_bytes(counts: dict[str, np.ndarray[Any, Any]], optimizer: str) -> int:
    state = {"sgd": 0, "adagrad": 16, "rowwise_adagrad": 1, "adam": 32}[optimizer]
    return sum(len(each) for each in counts.values()) * FLOAT * (16 + state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("budget", [0.03, 0.1, 0.5, 1.0, 2.5])
def test_the_bytes_are_just_below_the_budget(optimizer: Any, budget: float) -> None:
    counts = counts_of(3)
    sizes = Sizes(16, optimizer)
    found = static_ranges(counts, CompressionConfig("static", budget), MODEL, sizes)
    size = sum(sizes.table(each) for each in found.values())
    limit = budget * single_bytes(counts, optimizer)
    widest = sizes.row(64) + sizes.projection(64)
    assert limit - 8 * widest <= size <= limit
    for name, ranges in found.items():
        assert sum(each.rows for each in ranges) == len(counts[name])
        assert all(wide.width > narrow.width for wide, narrow in pairwise(ranges))
        assert sum(each.share for each in ranges) == pytest.approx(1)


def test_the_same_number_of_lookups_decides_on_a_width_in_every_table() -> None:
    draw, compared = random.Random(5), 0
    for seed in range(8):
        counts = counts_of(seed)
        compression = CompressionConfig("static", draw.uniform(0.05, 1.5), alpha=draw.uniform(0.2, 1.0))
        found = static_ranges(counts, compression, MODEL, Sizes(16, "sgd"))
        for width in (64, 32):
            # Counts of the last row that has the width, and of the row after it, in each table.
            last, after = [], []
            for name, ranges in found.items():
                end = 0
                for each in ranges:
                    end += each.rows
                    if each.width == width and end < len(counts[name]):
                        last.append(int(counts[name][end - 1]))
                        after.append(int(counts[name][end]))
            compared += len(last) > 1
            assert max(after, default=0) <= min(last, default=0)
    assert compared > 3


def test_wide_rows_are_never_fewer_than_their_columns_and_narrow_ones_save_more_than_their_w2() -> None:
    sizes = Sizes(16, "adagrad")
    for seed in range(6):
        for ranges in static_ranges(counts_of(seed), CompressionConfig("static", 0.4), MODEL, sizes).values():
            for each in ranges:
                assert each.width <= 16 or each.rows >= each.width
                assert (
                    each.width in (0, 16)
                    or each.width > 16
                    or each.rows * (sizes.row(16) - sizes.row(each.width)) > sizes.projection(each.width)
                )


def test_a_generous_budget_gives_all_rows_the_largest_width() -> None:
    counts = {"t": np.arange(5000, 0, -1)}
    (whole,) = static_ranges(counts, CompressionConfig("static", 1e3), MODEL, Sizes(16, "sgd"))["t"]
    assert (whole.rows, whole.width) == (5000, 64)


def test_row_0_is_kept_with_the_most_frequent_rows() -> None:
    counts = counts_of(1, tables=1)["t0"]
    counts[0] = 0
    first, *_, last = static_ranges({"t": counts}, CompressionConfig("static", 0.2), MODEL, Sizes(16, "sgd"))["t"]
    assert first.width > last.width == 0


def test_default_widths() -> None:
    assert default_widths(MODEL) == (64, 32, 16, 8)
    assert default_widths(ModelConfig(embedding_dim=16, hidden_dim=None)) == (16, 8)
    assert default_widths(ModelConfig(embedding_dim=4, hidden_dim=12)) == (12, 4)


def test_ids_that_are_not_sorted_are_refused() -> None:
    counts = np.arange(1, 5001)
    with pytest.raises(UserError, match=r"the ids of table 't' are not sorted by descending frequency"):
        static_ranges({"t": counts}, CompressionConfig("static"), MODEL, Sizes(16, "sgd"))


def test_a_budget_without_room_for_a_row_says_what_is_possible() -> None:
    counts = {"t": np.arange(1000, 0, -1)}
    with pytest.raises(UserError, match=r"one row of each table cannot be stored; it must be at least 1\.0e-03"):
        static_ranges(counts, CompressionConfig("static", 1e-4), MODEL, Sizes(16, "sgd"))


def test_every_table_stores_a_row() -> None:
    counts = {"frequent": np.arange(90_000, 0, -30), "rare": np.ones(2000, dtype=np.int64)}
    found = static_ranges(counts, CompressionConfig("static", 0.2), MODEL, Sizes(16, "sgd"))
    assert [(each.rows, each.width) for each in found["rare"]] == [(1, 16), (1999, 0)]


def test_row_0_does_not_count() -> None:
    counts = counts_of(4, tables=1)["t0"]
    found = []
    for outside in (0, 10**9):
        counts[0] = outside
        found.append(static_ranges({"t": counts}, CompressionConfig("static", 0.3), MODEL, Sizes(16, "adagrad")))
    assert found[0] == found[1]
