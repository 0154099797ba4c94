"""The expected skew of owners, against batches that are drawn."""

import numpy as np
import pytest

from mlet_dist.embeddings.planning.owner_skew import (
    ExpectedLookups,
    busiest_owner,
    expected_lookups,
    sums_of_blocks,
)

SIZES = [(4, 1.05), (2, 1.2), (8, 0.0)]  # ranks; the exponent of Zipf's law


@pytest.mark.parametrize(("world_size", "exponent"), SIZES)
def test_expected_lookups_are_those_of_drawn_batches(world_size: int, exponent: float) -> None:
    rows, ids, trials = 1003, 200, 400
    counts = (1e6 * np.arange(1, rows + 1) ** -exponent).astype(np.int64)
    found = expected_lookups(counts, ids, world_size)
    generator, block = np.random.default_rng(0), -(-rows // world_size)
    drawn = generator.choice(rows, size=(trials, world_size, ids), p=counts / counts.sum())
    owners = np.zeros(world_size)
    distinct, of_all = 0.0, 0.0
    for batches in drawn:
        for batch in batches:
            unique = np.unique(batch)
            distinct += len(unique) / (trials * world_size)
            owners += np.bincount(unique // block, minlength=world_size)
        of_all += len(np.unique(batches)) / trials
    assert found.distinct_ids == pytest.approx(distinct, rel=0.01)
    assert found.distinct_of_all == pytest.approx(of_all, rel=0.01)
    np.testing.assert_allclose(found.shares, owners / owners.sum(), atol=0.01)


def test_skewed_ids_have_fewer_distinct_ones_and_a_busier_first_owner() -> None:
    even = expected_lookups(np.full(10_000, 7), 1000, 8)
    skewed = expected_lookups((1e6 * np.arange(1, 10_001) ** -1.2).astype(np.int64), 1000, 8)
    assert skewed.distinct_ids < even.distinct_ids
    assert skewed.shares[0] > 2 * even.shares[0] == pytest.approx(0.25)
    np.testing.assert_allclose(even.shares, 1 / 8)


def test_other_blocks_can_be_passed() -> None:
    counts = np.array([8, 4, 2, 1])
    found = expected_lookups(counts, 1, 2, sums=lambda values, ranks: sums_of_blocks(values[[0, 3, 1, 2]], ranks))
    np.testing.assert_allclose(found.shares, [9 / 15, 6 / 15])


def test_rows_without_lookups() -> None:
    found = expected_lookups(np.zeros(5, np.int64), 10, 2)
    assert (found.distinct_ids, found.distinct_of_all) == (0, 0)
    np.testing.assert_allclose(found.shares, 0.5)


def test_the_busiest_owner_is_that_of_all_tables_together() -> None:
    def lookups(*shares: float) -> ExpectedLookups:
        return ExpectedLookups(1, 1, np.array(shares))

    tables = {"a": lookups(0.7, 0.3), "b": lookups(0.7, 0.3)}
    together = busiest_owner(tables, {"a": 1, "b": 1}, {"a": [0, 1], "b": [0, 1]})
    assert together == pytest.approx(1.4)
    # The blocks of the second table are on the other ranks.
    assert busiest_owner(tables, {"a": 1, "b": 1}, {"a": [0, 1], "b": [1, 0]}) == pytest.approx(1.0)
    assert busiest_owner(tables, {"a": 3, "b": 1}, {"a": [0, 1], "b": [1, 0]}) == pytest.approx(1.2)
    assert busiest_owner({}, {}, {}) == 1.0
