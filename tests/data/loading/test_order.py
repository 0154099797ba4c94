"""Tests of mlet_dist.data.loading.order."""

from collections.abc import Iterable
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.data.loading.order import Order, Shuffle

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]


def make_order(group_rows: list[int], rank: int = 0, world_size: int = 1, **changes: object) -> Order:
    arguments = {"batch_size": 12, "shuffle": None} | changes
    return Order(np.array(group_rows), rank=rank, world_size=world_size, **arguments)  # type: ignore[arg-type]


def batches_of(order: Order, group_rows: list[int], epoch: int = 0, first_batch: int = 0) -> list[list[int]]:
    """Return the rows of each batch, by their number in the files."""
    firsts = np.cumsum([0, *group_rows])
    sequence = np.concatenate([np.arange(firsts[g], firsts[g + 1]) for g in order.groups(epoch)])
    found = []
    for window in order.windows(epoch, first_batch):
        rows = sequence[window.start : window.stop]
        found += [(rows if pick is None else rows[pick]).tolist() for pick in order.picks(epoch, window)]
    return found


def flat(lists: Iterable[list[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def global_batches(group_rows: list[int], world_size: int, epoch: int = 0, **changes: object) -> list[list[int]]:
    ranks = [
        batches_of(make_order(group_rows, rank, world_size, **changes), group_rows, epoch) for rank in range(world_size)
    ]
    return [flat(parts) for parts in zip(*ranks, strict=True)]


GROUPS = st.lists(st.integers(0, 30), min_size=1, max_size=12)
SHUFFLES = st.none() | st.builds(Shuffle, seed=st.integers(0, 2**63 - 1), buffer_rows=st.integers(1, 400))


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, shuffle=SHUFFLES, epoch=st.integers(0, 3), times=st.integers(1, 3))
def test_the_order_does_not_depend_on_the_number_of_ranks(
    groups: list[int], shuffle: Shuffle | None, epoch: int, times: int
) -> None:
    arguments = {"batch_size": 12 * times, "shuffle": shuffle}
    alone = global_batches(groups, 1, epoch, **arguments)
    for world_size in (2, 3, 4):
        assert global_batches(groups, world_size, epoch, **arguments) == alone


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, shuffle=SHUFFLES, epoch=st.integers(0, 3), batch_size=st.integers(1, 40))
def test_no_row_is_lost_or_repeated_in_an_epoch(
    groups: list[int], shuffle: Shuffle | None, epoch: int, batch_size: int
) -> None:
    order = make_order(groups, batch_size=batch_size, shuffle=shuffle)
    found = batches_of(order, groups, epoch)
    complete, rest = divmod(sum(groups), batch_size)
    assert [len(batch) for batch in found] == [batch_size] * complete + [rest] * (rest > 0)
    assert [order.batch_rows(batch) for batch in range(order.batches)] == [len(batch) for batch in found]
    assert sorted(flat(found)) == list(range(sum(groups)))
    assert all(window.stop - window.start <= order.window_rows for window in order.windows(epoch, 0))


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, batch_size=st.integers(1, 20), world_size=st.integers(1, 4))
def test_file_order_covers_every_row_once(groups: list[int], batch_size: int, world_size: int) -> None:
    batches = global_batches(groups, world_size, batch_size=batch_size * world_size)
    assert flat(batches) == list(range(sum(groups)))


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, shuffle=SHUFFLES, data=st.data())
def test_an_epoch_resumes_at_any_batch(groups: list[int], shuffle: Shuffle | None, data: st.DataObject) -> None:
    order = make_order(groups, batch_size=4, shuffle=shuffle)
    first = data.draw(st.integers(0, order.batches))
    assert batches_of(order, groups, 1, first) == batches_of(order, groups, 1)[first:]


def test_file_order() -> None:
    assert global_batches([5, 1, 7], 2, batch_size=6) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]


def test_epochs_and_seeds_have_different_orders() -> None:
    groups = [50] * 8
    orders = [
        global_batches(groups, 1, epoch, batch_size=10, shuffle=Shuffle(seed, 100))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert global_batches(groups, 1, 1, batch_size=10, shuffle=Shuffle(0, 100)) == orders[1]


def test_a_batch_is_a_sample_of_its_window() -> None:
    """Each of the 200 batches of a window takes one of every 200 neighbours, uniformly at random."""
    groups = [1000] * 20
    found = np.array(batches_of(make_order(groups, batch_size=100, shuffle=Shuffle(3, 20_000)), groups))
    sequence = [
        group * 1000 + row for group in make_order(groups, shuffle=Shuffle(3, 1)).groups(0) for row in range(1000)
    ]
    place = np.argsort(sequence)[found]
    assert np.array_equal(place // 200, np.tile(np.arange(100), (200, 1)))
    within = place % 200
    assert abs(within.mean(axis=1) - 99.5).max() < 5 * 57.7 / np.sqrt(100)
    assert abs(np.corrcoef(within.T)[np.triu_indices(100, 1)]).max() < 5 / np.sqrt(200)


def test_row_groups_are_permuted_uniformly() -> None:
    """Over 400 epochs each of 8 row groups is first about equally often."""
    order = make_order([10] * 8, shuffle=Shuffle(0, 20))
    firsts = np.bincount([order.groups(epoch)[0] for epoch in range(400)], minlength=8)
    assert abs(firsts - 50).max() < 5 * np.sqrt(50)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_no_rows_of_a_shuffled_window(world_size: int) -> None:
    orders = [
        make_order([500] * 10, rank, world_size, batch_size=60, shuffle=Shuffle(0, 1200)) for rank in range(world_size)
    ]
    parts = sorted((window.start, window.stop) for order in orders for window in order.windows(0, 0))
    assert parts[0][0] == 0
    assert parts[-1][1] == 5000
    assert all(before[1] == after[0] for before, after in pairwise(parts))


def test_memory_of_four_billion_rows_is_that_of_their_row_groups() -> None:
    """One of 64 ranks starts in the middle of four billion rows, with arrays as long as its part of a window."""
    order = make_order([16_384] * 250_000, 40, 64, batch_size=65_536, shuffle=Shuffle(0, 1 << 20))
    assert order.batches == 62_500
    window = next(order.windows(5, 31_259))
    picks = list(order.picks(5, window))
    assert [0 if pick is None else len(pick) for pick in picks] == [1024] * (16 - 31_259 % 16)
    assert window.stop - window.start == order.window_rows == (1 << 20) // 64


def test_the_order_of_an_epoch_never_changes() -> None:
    """A run that resumes under another version of NumPy or mlet_dist must find the same order."""
    found = global_batches([4] * 4, 1, 2, batch_size=4, shuffle=Shuffle(7, 8))
    assert found == [[1, 2, 8, 10], [0, 3, 9, 11], [4, 7, 12, 15], [5, 6, 13, 14]]


def test_the_incomplete_batch_is_a_sample_of_the_last_window() -> None:
    """Each of its 25 rows is one of 5 neighbours, any of them, and other ones in each epoch."""
    order = make_order([425], batch_size=100, shuffle=Shuffle(1, 1000))
    last = np.array([batches_of(order, [425], epoch)[-1] for epoch in range(400)])
    assert np.array_equal(last // 5, np.tile(np.arange(25), (400, 1)))
    chosen = np.bincount((last % 5).ravel())
    assert abs(chosen - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize("shuffle", [None, Shuffle(0, 30)])
def test_the_first_ranks_have_the_rows_of_the_incomplete_batch(shuffle: Shuffle | None) -> None:
    shares = [batches_of(make_order([17, 14], rank, 4, shuffle=shuffle), [17, 14])[-1] for rank in range(4)]
    assert [len(share) for share in shares] == [3, 3, 1, 0]


@pytest.mark.parametrize("shuffle", [None, Shuffle(0, 30)])
def test_a_split_may_be_smaller_than_a_batch(shuffle: Shuffle | None) -> None:
    (batch,) = global_batches([3, 4], 2, shuffle=shuffle)
    assert sorted(batch) == list(range(7))


@pytest.mark.parametrize("buffer_rows", [1, 12, 23])
@pytest.mark.parametrize("batches", [2, 3, 10])
def test_a_buffer_of_less_than_two_batches_still_shuffles_two(buffer_rows: int, batches: int) -> None:
    """This holds within one row group, too, which no permutation of row groups shuffles."""
    groups, shuffle = [12 * batches], Shuffle(3, buffer_rows)
    epochs = [global_batches(groups, 2, epoch, shuffle=shuffle) for epoch in (0, 1)]
    assert make_order(groups, shuffle=shuffle).mixes
    for found in epochs:
        for number, batch in enumerate(found[: batches // 2 * 2]):
            first = number // 2 * 24
            assert [row // 2 for row in batch] == list(range(first // 2, first // 2 + 12))
    assert epochs[0][:2] != epochs[1][:2] != [list(range(12)), list(range(12, 24))] != epochs[0][:2]


def test_where_nothing_can_be_shuffled() -> None:
    for groups, mixes in (([12], False), ([0, 7, 0], False), ([9, 3], True), ([17], True), ([24], True)):
        assert make_order(groups, shuffle=Shuffle(0, 100)).mixes == mixes
        differ = len({str(global_batches(groups, 1, epoch, shuffle=Shuffle(0, 100))) for epoch in range(8)}) > 1
        assert differ == mixes
    assert not make_order([24]).mixes
