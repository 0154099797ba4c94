"""The widths of rows that static compression chooses."""

import dataclasses
import random
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlet_dist.config.byte_sizes import ByteSize
from mlet_dist.config.compression_section import CompressionConfig, TableCompressionConfig
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.table_settings import TableSettings
from mlet_dist.embeddings.planning.cost_model import FLOAT
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.models.row_widths import Sizes, budget_bytes, default_widths, largest_bytes, static_ranges

MODEL = ModelConfig(embedding_dim=16, hidden_dim=64)
TABLES = defaultdict[str, TableSettings](lambda: MODEL.of_all_tables)
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
    found = static_ranges(counts, CompressionConfig(shared_rows=False, policy="static", budget=budget), TABLES, sizes)
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
        compression = CompressionConfig(
            shared_rows=False, policy="static", budget=draw.uniform(0.05, 1.5), alpha=draw.uniform(0.2, 1.0)
        )
        found = static_ranges(counts, compression, TABLES, Sizes(16, "sgd"))
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
        for ranges in static_ranges(
            counts_of(seed), CompressionConfig(shared_rows=False, policy="static", budget=0.4), TABLES, sizes
        ).values():
            for each in ranges:
                assert each.width <= 16 or each.rows >= each.width
                assert (
                    each.width in (0, 16)
                    or each.width > 16
                    or each.rows * (sizes.row(16) - sizes.row(each.width)) > sizes.projection(each.width)
                )


def test_a_generous_budget_gives_all_rows_the_largest_width() -> None:
    counts = {"t": np.arange(5000, 0, -1)}
    (whole,) = static_ranges(
        counts, CompressionConfig(shared_rows=False, policy="static", budget=1e3), TABLES, Sizes(16, "sgd")
    )["t"]
    assert (whole.rows, whole.width) == (5000, 64)


def test_row_0_is_kept_with_the_most_frequent_rows() -> None:
    counts = counts_of(1, tables=1)["t0"]
    counts[0] = 0
    first, *_, last = static_ranges(
        {"t": counts}, CompressionConfig(shared_rows=False, policy="static", budget=0.2), TABLES, Sizes(16, "sgd")
    )["t"]
    assert first.width > last.width == 0


def test_default_widths() -> None:
    assert default_widths(MODEL.of_all_tables, CompressionConfig()) == (64, 32, 16, 8, 4)
    assert default_widths(ModelConfig(embedding_dim=16, hidden_dim=None).of_all_tables, CompressionConfig()) == (
        16,
        8,
        4,
    )
    assert default_widths(ModelConfig(embedding_dim=4, hidden_dim=12).of_all_tables, CompressionConfig()) == (12, 4)


def test_ids_that_are_not_sorted_are_refused() -> None:
    counts = np.arange(1, 5001)
    with pytest.raises(UserError, match=r"the ids of table 't' are not sorted by descending frequency"):
        static_ranges({"t": counts}, CompressionConfig(shared_rows=False, policy="static"), TABLES, Sizes(16, "sgd"))


def test_a_budget_without_room_for_a_row_says_what_is_possible() -> None:
    counts = {"t": np.arange(1000, 0, -1)}
    with pytest.raises(
        UserError, match=r"one row of each table cannot be stored; it must be at least 64 bytes, which is 0\.001 of the"
    ):
        static_ranges(
            counts, CompressionConfig(shared_rows=False, policy="static", budget=1e-4), TABLES, Sizes(16, "sgd")
        )


def test_every_table_stores_a_row() -> None:
    counts = {"frequent": np.arange(90_000, 0, -30), "rare": np.ones(2000, dtype=np.int64)}
    found = static_ranges(
        counts, CompressionConfig(shared_rows=False, policy="static", budget=0.2), TABLES, Sizes(16, "sgd")
    )
    assert [(each.rows, each.width) for each in found["rare"]] == [(1, 16), (1999, 0)]


def test_row_0_does_not_count() -> None:
    counts = counts_of(4, tables=1)["t0"]
    found = []
    for outside in (0, 10**9):
        counts[0] = outside
        found.append(
            static_ranges(
                {"t": counts},
                CompressionConfig(shared_rows=False, policy="static", budget=0.3),
                TABLES,
                Sizes(16, "adagrad"),
            )
        )
    assert found[0] == found[1]


def test_a_budget_of_bytes_is_that_of_its_share() -> None:
    counts = counts_of(2)
    single = single_bytes(counts, "sgd")
    share = CompressionConfig(shared_rows=False, policy="static", budget=0.25)
    size = CompressionConfig(shared_rows=False, policy="static", budget=ByteSize(f"{single // 4}B"))
    assert budget_bytes(share, single) == budget_bytes(size, single) == single // 4
    found = [static_ranges(counts, each, TABLES, Sizes(16, "sgd")) for each in (share, size)]
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"compression\.budget 100B is 100 bytes, in which .* at least 320 bytes"):
        static_ranges(
            counts,
            CompressionConfig(shared_rows=False, policy="static", budget=ByteSize("100B")),
            TABLES,
            Sizes(16, "sgd"),
        )


def limited(budget: float | ByteSize, **tables: tuple[int, int | None]) -> CompressionConfig:
    return CompressionConfig(
        shared_rows=False,
        policy="static",
        budget=budget,
        tables={name: TableCompressionConfig(*of) for name, of in tables.items()},
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_keep_to_their_limits_and_the_others_take_the_rest(optimizer: Any) -> None:
    counts, sizes = counts_of(6), Sizes(16, optimizer)
    free = static_ranges(counts, CompressionConfig(shared_rows=False, policy="static", budget=0.4), TABLES, sizes)
    found = static_ranges(counts, limited(0.4, t0=(8, None), t1=(0, 16), t2=(16, 32)), TABLES, sizes)
    widths = {name: {each.width for each in ranges} for name, ranges in found.items()}
    assert {0, 32} <= {each.width for name in ("t0", "t1", "t2") for each in free[name]}
    assert min(widths["t0"]) == 8
    assert max(widths["t1"]) == 16
    assert widths["t2"] <= {16, 32}
    size, limit = sum(sizes.table(each) for each in found.values()), 0.4 * single_bytes(counts, optimizer)
    assert limit - 8 * (sizes.row(64) + sizes.projection(64)) <= size <= limit
    for name, ranges in found.items():
        assert sum(each.rows for each in ranges) == len(counts[name])
        assert sum(each.share for each in ranges) == pytest.approx(1)


def test_a_table_of_one_width_need_not_be_sorted() -> None:
    counts = counts_of(7, tables=1) | {"unsorted": np.arange(1, 3001)}
    found = static_ranges(counts, limited(0.9, unsorted=(16, 16)), TABLES, Sizes(16, "sgd"))
    assert [(each.rows, each.width) for each in found["unsorted"]] == [(3000, 16)]
    assert largest_bytes({"unsorted": 3000}, limited(1, unsorted=(16, 16)), TABLES, Sizes(16, "sgd")) == 3000 * 64


def test_limits_that_cannot_be_met_are_named() -> None:
    counts = counts_of(7, tables=1)
    for limits, key in (((12, None), "min_width is 12"), ((0, 128), "max_width is 128")):
        with pytest.raises(
            UserError, match=rf"compression\.tables\.t0\.{key}, .* none of the widths 4, 8, 16, 32, 64; use"
        ):
            static_ranges(counts, limited(0.5, t0=limits), TABLES, Sizes(16, "sgd"))
    with pytest.raises(
        UserError, match=r"with the widths of compression\.tables cannot be stored; it must be at least"
    ):
        static_ranges(counts, limited(0.5, t0=(16, None)), TABLES, Sizes(16, "sgd"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("budget", [0.15, 0.5, 1.0])
def test_adaptive_tables_have_slots_and_utilities_within_the_budget(optimizer: Any, budget: float) -> None:
    counts, compression = counts_of(3), CompressionConfig(policy="adaptive", budget=budget)
    sizes = Sizes.of(MODEL, optimizer, compression)
    found = static_ranges(counts, compression, TABLES, sizes)
    rows = {width: sum(each.rows for of in found.values() for each in of if each.width == width) for width in (64, 8)}
    assert all(number == 0 or number >= 24 for number in rows.values())
    stored = sum(Sizes(16, optimizer).table(each) for each in found.values())
    slots = 6 * sum(len(each) for each in counts.values())
    assert stored + slots <= budget * single_bytes(counts, optimizer)
    assert stored + slots >= 0.9 * budget * single_bytes(counts, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("hidden_dim", [None, 64])
@pytest.mark.parametrize("rows", [[25], [25, 100], [3001, 10], [1000, 1, 20001, 25, 10]])
def test_what_adaptive_tables_hold_stays_within_the_budget(
    optimizer: Any, nested: bool, hidden_dim: int | None, rows: list[int]
) -> None:
    counts = {f"t{i}": np.sort(1000 // np.arange(1, each + 1))[::-1] for i, each in enumerate(rows)}
    model = ModelConfig(embedding_dim=16, hidden_dim=hidden_dim)
    chunk_width = None if nested else (hidden_dim or 16) // 4
    for budget in (0.3, 0.5, 1.0, 3.0, 10.0):
        compression = CompressionConfig(policy="adaptive", budget=budget, nested=nested, chunks=4)
        sizes = Sizes.of(model, optimizer, compression)
        try:
            found = static_ranges(counts, compression, dict.fromkeys(counts, model.of_all_tables), sizes)
        except UserError:  # too small a budget
            continue
        tables = [
            MultiLayerEmbeddingBagConfig(
                name=name,
                num_embeddings=sum(each.rows for each in ranges),
                embedding_dim=16,
                hidden_dim=hidden_dim,
                feature_names=[name],
                row_ranges=ranges,
            )
            for name, ranges in found.items()
        ]
        layout = SlotLayout.of(tables, chunk_width)
        slots = layout.num_chunks * layout.rows_per_bucket * layout.num_buckets
        plain = Sizes(16, optimizer)
        pools = sum(layout.slots(index) * plain.row(pool.width) for index, pool in enumerate(layout.pools))
        of_ranges = sum(plain.projection(each.width) for of in found.values() for each in of)
        of_tables = len(rows) * plain.projection(64) if hidden_dim else 0
        held = pools + (of_ranges if nested else of_tables) + 6 * slots + 8 * layout.num_buckets + 8
        assert held == sizes.trained(found)
        single = sizes.single({name: len(each) for name, each in counts.items()})
        assert held <= sizes.total(found) <= budget_bytes(compression, single)


def test_too_few_chunks_are_refused() -> None:
    compression = CompressionConfig(policy="adaptive", nested=False, chunks=2, budget=1e3)
    sizes = Sizes.of(MODEL, "sgd", compression)
    with pytest.raises(UserError, match=r"stores 4 chunks of rows, and compression.nested false needs 24; use"):
        static_ranges({"t": np.array([5, 2])}, compression, TABLES, sizes)


def test_adaptive_tables_leave_out_widths_of_a_few_rows() -> None:
    counts = {"t": np.array([1_000_000] * 10 + [1] * 600)}
    static, adaptive = (
        static_ranges(
            counts,
            CompressionConfig(shared_rows=False, policy=policy, budget=0.3, widths=(16, 8)),
            TABLES,
            Sizes(16, "sgd"),
        )
        for policy in ("static", "adaptive")
    )
    assert [each.width for each in static["t"]] == [16, 8, 0]
    assert [each.width for each in adaptive["t"]] == [8, 0]
    with pytest.raises(UserError, match="policy adaptive needs 24"):
        static_ranges(counts, CompressionConfig(policy="adaptive", budget=0.01, widths=(16,)), TABLES, Sizes(16, "sgd"))


def test_the_largest_width_of_an_adaptive_table_may_be_one_that_is_left_out() -> None:
    counts = {"t": np.array([1_000_000] * 10 + [1] * 600)}

    def of(**limits: Any) -> dict[str, Any]:
        tables = {"t": TableCompressionConfig(**limits)}
        compression = CompressionConfig(policy="adaptive", budget=0.3, widths=(16, 8), tables=tables)
        return static_ranges(counts, compression, TABLES, Sizes(16, "sgd"))

    assert of(max_width=16) == of() == of(max_width=8)
    assert [each.width for each in of()["t"]] == [8, 0]


def test_an_adaptive_table_without_any_width_left_is_refused() -> None:
    counts = {"small": np.full(10, 50), "large": np.full(600, 50)}
    compression = CompressionConfig(
        policy="adaptive", budget=10.0, widths=(16, 8), tables={"small": TableCompressionConfig(max_width=8)}
    )
    message = (
        r"compression\.tables\.small\.max_width is 8, and with compression\.budget 10\.0 too few rows have so few "
        r"columns: policy adaptive needs 24 of each width; use a larger max_width, or policy static$"
    )
    with pytest.raises(UserError, match=message):
        static_ranges(counts, compression, TABLES, Sizes(16, "sgd"))


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.3])
def test_rows_of_width_0_share_a_row_within_the_budget(budget: float) -> None:
    counts, sizes = counts_of(3), Sizes(16, "adagrad")
    found = static_ranges(counts, CompressionConfig(policy="static", budget=budget), TABLES, sizes)
    assert sum(sizes.table(each) for each in found.values()) <= budget * single_bytes(counts, "adagrad")
    assert any(not ranges[-1].width for ranges in found.values())
    for name, ranges in found.items():
        assert sum(each.rows for each in ranges) == len(counts[name])
        assert all(each.width for each in ranges[:-1])
        if not ranges[-1].width:
            assert ranges[-2][:2] == (1, 16)


def test_tables_of_their_own_sizes_have_their_own_widths() -> None:
    """d, k and W2 are those of each table, in the widths, in the budget and in the share of single-layer tables."""
    counts = counts_of(7, largest=9000)
    own = {"t0": (32, 64), "t1": (8, None), "t2": (16, 128)}
    tables = {name: MODEL.of_all_tables for name in counts} | {
        name: dataclasses.replace(MODEL.of_all_tables, embedding_dim=d, hidden_dim=k) for name, (d, k) in own.items()
    }
    sizes = Sizes(16, "adagrad", own_dims={name: each.embedding_dim for name, each in tables.items()})
    compression = CompressionConfig(policy="static", budget=2.0)
    found = static_ranges(counts, compression, tables, sizes)
    stored = single = 0
    for name, ranges in found.items():
        d = tables[name].embedding_dim
        assert {each.width for each in ranges} <= {0, *default_widths(tables[name], compression)}
        stored += sum(2 * FLOAT * each.width * each.rows for each in ranges)
        stored += sum(2 * FLOAT * each.width * d for each in ranges if each.width not in (0, d))
        single += 2 * FLOAT * d * len(counts[name])
    assert stored == sizes.total(found)
    assert 1.9 * single < stored <= 2 * single
    assert {max(each.width for each in found[name]) for name in own} == {64, 8, 128}
    widths = dataclasses.replace(compression, widths=(64, 16))
    with pytest.raises(
        UserError, match=r"^compression.widths has no width up to 8, the embedding_dim of table 't1'; a"
    ):
        static_ranges(counts, widths, tables, sizes)
