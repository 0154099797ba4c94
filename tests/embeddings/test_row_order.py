"""The order of stored rows: a bijection for any size, initial values by id, and even owners for any number of ranks."""

import random

import pytest
import torch

from mlet_dist.embeddings.initializers import GivenInitializer, RowInitializer, StoredRowInitializer
from mlet_dist.embeddings.row_order import (
    LANES,
    RowOrder,
    busiest_over_mean,
    expected_requests,
    is_spread,
    requests_of_owners,
)


def _slow_order(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (part, id) of each stored row, lane by lane, from the definition."""
    rows: dict[tuple[int, int], list[int]] = {}
    for part, size in enumerate(sizes):
        for i in range(size):
            chunk, first = 1, 0
            while i >= first + LANES * chunk:
                first, chunk = first + LANES * chunk, chunk * (2 if first else 1)
            lane = (i - first) // chunk
            rows.setdefault((int(f"{lane:013b}"[::-1], 2), part), []).append(i)
    return [(part, i) for (_, part), ids in sorted(rows.items()) for i in ids]


@pytest.mark.parametrize(
    "sizes",
    [(1,), (2,), (7,), (LANES - 1,), (LANES,), (LANES + 1,), (40_000,), (70_001,), (3, 5, 20_000, 1), (9_000, 16_385)],
)
def test_rows_are_stored_as_defined(sizes: tuple[int, ...]) -> None:
    order = RowOrder(sizes)
    firsts = [sum(sizes[:part]) for part in range(len(sizes))]
    expected = torch.tensor([firsts[part] + i for part, i in _slow_order(sizes)])
    assert torch.equal(order.rows(0, order.num_rows), expected)
    assert torch.equal(order.stored_rows(expected), torch.arange(order.num_rows))


def test_the_order_is_a_bijection_for_every_size() -> None:
    for size in (*range(1, 70), 255, 256, 257, 399):
        order = RowOrder((size,))
        stored = order.stored_rows(torch.arange(size))
        assert torch.equal(stored.sort().values, torch.arange(size)), size
        assert torch.equal(order.rows(0, size)[stored], torch.arange(size)), size


def test_the_order_of_large_tables_is_invertible() -> None:
    draw = random.Random(0)
    for bits in (20, 27, 33, 38, 45):
        sizes = (draw.randrange(1, 1 << bits), 1, draw.randrange(1, 1 << bits))
        order = RowOrder(sizes)
        rows = torch.tensor([0, order.num_rows - 1, *(draw.randrange(order.num_rows) for _ in range(200))])
        stored = order.stored_rows(rows)
        assert int(stored.min()) >= 0
        assert int(stored.max()) < order.num_rows
        found = torch.cat([order.rows(each, each + 1) for each in stored.tolist()])
        assert torch.equal(found, rows), sizes


def test_rows_of_ids_of_any_shape_and_dtype() -> None:
    order = RowOrder((100_000,))
    ids = torch.randint(100_000, (3, 4))
    assert torch.equal(order.stored_rows(ids).view(-1), order.stored_rows(ids.view(-1)))
    assert torch.equal(order.stored_rows(ids.int()), order.stored_rows(ids))
    assert order.stored_rows(ids[:0]).shape == (0, 4)


def test_values_are_moved_there_and_back() -> None:
    order = RowOrder((20_000, 17))
    values = torch.randn(20_017, 3)
    stored = order.to_stored(values)
    assert torch.equal(stored[order.stored_rows(torch.arange(20_017))], values)
    assert torch.equal(order.from_stored(stored), values)
    with pytest.raises(ValueError, match="17 values for a table of 20,017 rows"):
        order.to_stored(values[:17])


@pytest.mark.parametrize(("ranks", "zero_first_row"), [(1, True), (3, False), (8, True)])
def test_initial_values_are_those_of_rows_by_id(ranks: int, zero_first_row: bool) -> None:
    sizes = (20_000, 5, 9_001)
    parts = tuple(
        RowInitializer(f"w{part}", size, "normal", 1.0, seed=3, zero_first_row=zero_first_row)
        for part, size in enumerate(sizes)
    )
    by_id = torch.empty(sum(sizes), 4)
    for part, first in zip(parts, (0, 20_000, 20_005), strict=True):
        part(by_id[first : first + part.num_rows])
    order, block = RowOrder(sizes), -(-sum(sizes) // ranks)
    shards = []
    for rank in range(ranks):
        shard = torch.empty(min(block, sum(sizes) - rank * block), 4)
        StoredRowInitializer(order, parts).fill(shard, rank * block)
        shards.append(shard)
    assert torch.equal(order.from_stored(torch.cat(shards)), by_id)
    with pytest.raises(ValueError, match=r"do not lie inside 0\.\.29006"):
        StoredRowInitializer(order, parts).fill(torch.empty(2, 4), 29_005)


def test_an_initializer_of_the_users_own_sees_rows_by_id() -> None:
    order, given = RowOrder((9_000,)), torch.randn(9_000, 2)
    weight = torch.empty(9_000, 2)
    GivenInitializer(order, lambda each: each.copy_(given))(weight)
    assert torch.equal(order.from_stored(weight), given)
    shard = torch.empty(10, 2)
    GivenInitializer(order, lambda each: each.fill_(2))(shard)
    assert (shard == 2).all()


def _zipf(rows: int, exponent: float) -> torch.Tensor:
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


@pytest.mark.parametrize("exponent", [1.05, 1.2])
@pytest.mark.parametrize("ranks", [2, 3, 8, 48, 64, 1000, 1024])
def test_owners_are_even(ranks: int, exponent: float) -> None:
    # A batch must ask the mean owner for some rows, because the owner of the most frequent row is asked by every rank.
    requests = expected_requests(_zipf(1_000_000, exponent), 65_536 if ranks > 64 else 8_192)
    by_id = busiest_over_mean([requests_of_owners(None, requests, ranks)])
    spread = requests_of_owners(RowOrder((1_000_000,)), requests, ranks)
    assert float(spread.sum()) == pytest.approx(float(requests.sum()))
    assert busiest_over_mean([spread]) <= 1.3 < by_id


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_owners_of_a_pool_are_even(ranks: int) -> None:
    ranges = [(3_000, 200_000), (50_000, 1_000), (8_192, 8_193)]  # frequent and rare rows of three tables
    frequent, rare = (tuple(sizes[index] for sizes in ranges) for index in (0, 1))
    requests = [expected_requests(_zipf(sum(sizes), 1.05), 4_096) for sizes in ranges]
    of_frequent = torch.cat([each[:size] for each, size in zip(requests, frequent, strict=True)])
    of_rare = torch.cat([each[size:] for each, size in zip(requests, frequent, strict=True)])
    for sizes, of_pool in ((frequent, of_frequent), (rare, of_rare)):
        assert busiest_over_mean([requests_of_owners(RowOrder(sizes), of_pool, ranks)]) <= 1.3


def test_a_manifest_names_the_order() -> None:
    assert not is_spread({})
    assert is_spread({"row_order": "spread"})
    with pytest.raises(ValueError, match="row_order is 'other'; this version of mlet_dist knows 'spread'"):
        is_spread({"row_order": "other"})
