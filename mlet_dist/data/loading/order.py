"""The order in which an epoch visits the rows of a split, and each rank's share of every batch.

Without shuffling, global batch g is rows [g·B, (g+1)·B) of the split in file order, and rank r of R takes rows
[r·b, (r+1)·b) of it, b = B/R. The last batch has the rest of the rows, so that the last ranks may have none of them.

With shuffling, the split's row groups are permuted, and the sequence of their rows is cut into windows of m·B rows. m
is what the shuffle buffer allows, but at least 2, since a window of one batch would shuffle nothing. A window makes m
batches: its rows [p·m, (p+1)·m) are dealt in random order, one to each batch, all to position p. So rank r's part of a
window is the contiguous range of rows [r·b·m, (r+1)·b·m), and a rank decodes no row groups of other ranks except those
on the borders of its range. The rows that do not fill a batch belong to the last window and make an incomplete batch
of it: of every position that this batch has, m + 1 rows are dealt instead of m.

Everything is a hash of seed, epoch and position: every rank of any world size computes its own part alone, and no array
is longer than the number of row groups or than a rank's part of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlet_dist.data.hashing import Hashes, hash_counters

IntArray = npt.NDArray[np.int64]

_GROUPS, _ROWS = range(2)  # what random numbers are drawn for


@dataclass(frozen=True)
class Shuffle:
    """Permute row groups, and rows within windows of ``buffer_rows`` rows (of all ranks), at least two batches."""

    seed: int
    buffer_rows: int


@dataclass(frozen=True)
class Window:
    """A rank's part of consecutive batches.

    Attributes:
        start, stop: range of positions in the epoch's sequence of rows.
        complete: number of complete batches that the window makes.
        rest: number of this rank's rows in the incomplete batch that follows them.
        skipped: number of its batches that come before the first one requested.
        batches: number of batches that the window makes, the same on every rank.
    """

    start: int
    stop: int
    complete: int
    rest: int
    skipped: int
    batches: int


class Order:
    """The order of one rank's rows in every epoch.

    Args:
        group_rows: (G,) number of rows of each row group of the split, in file order.
        batch_size: rows of a global batch (B), a multiple of ``world_size``.
        rank, world_size: r and R.
        shuffle: None keeps file order.

    Attributes:
        rows: number of rows of the split.
        batches: number of batches per epoch, the same on every rank; the last one may be incomplete.
        mixes: whether batches differ from epoch to epoch; they do not with one batch from one row group.
        window_rows: largest number of rows of a window on this rank.
    """

    def __init__(
        self,
        group_rows: IntArray,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        shuffle: Shuffle | None,
    ) -> None:
        self.rows = int(group_rows.sum())
        self.batches = -(-self.rows // batch_size)
        self._complete, rest = divmod(self.rows, batch_size)
        self.mixes = shuffle is not None and (self.batches > 1 or np.count_nonzero(group_rows) > 1)
        self._group_rows, self._shuffle = group_rows, shuffle
        self._batch_size, self._local_size = batch_size, batch_size // world_size
        self._first = rank * self._local_size
        self._rest_before = min(self._first, rest)
        self._rest = min(self._local_size, rest - self._rest_before)
        self._batches_per_window = 1
        if shuffle is not None:
            self._batches_per_window = max(1, min(max(2, shuffle.buffer_rows // batch_size), self._complete))
        self.window_rows = self._batches_per_window * self._local_size + self._rest

    def groups(self, epoch: int) -> IntArray:
        """Return the numbers of the row groups, (G,), in the order of ``epoch``."""
        count = len(self._group_rows)
        if self._shuffle is None:
            return np.arange(count)
        return np.argsort(_random_numbers(self._shuffle.seed, epoch, _GROUPS, 0, count))

    def windows(self, epoch: int, first_batch: int) -> Iterator[Window]:
        """Yield the rank's windows of ``epoch`` from the one with ``first_batch`` on; positions ascend."""
        step = self._batches_per_window
        # Shuffled, the incomplete batch is part of the last window; in file order, it is a window of its own.
        starts = range(0, self.batches if self._shuffle is None else max(1, self._complete), step)
        for batch in starts[min(first_batch // step, len(starts) - 1) :]:
            complete = min(step, self._complete - batch)
            is_last = batch == starts[-1] and self.batches > self._complete
            batches = complete + is_last
            rest_before, rest = (self._rest_before, self._rest) if is_last else (0, 0)
            start = batch * self._batch_size + self._first * complete + rest_before
            stop = start + self._local_size * complete + rest
            if batch + batches > first_batch:
                yield Window(start, stop, complete, rest, max(0, first_batch - batch), batches)

    def picks(self, epoch: int, window: Window) -> Iterator[IntArray | None]:
        """Yield the rows of each batch of the window, as offsets from ``window.start``; None is all rows in order."""
        if self._shuffle is None:
            yield None
            return
        random = _random_numbers(self._shuffle.seed, epoch, _ROWS, window.start, window.stop - window.start)
        # First the positions that the incomplete batch has, too, then the others.
        border = window.rest * (window.complete + 1)
        extended = _dealt(random[:border], 0, window.complete + 1)
        others = _dealt(random[border:], border, window.complete)
        for batch in range(window.skipped, window.batches):
            parts = [dealt[batch] for dealt in (extended, others) if batch < len(dealt)]
            yield np.concatenate(parts) if parts else np.empty(0, np.int64)

    def batch_rows(self, batch: int) -> int:
        """Return the number of rows of global batch ``batch`` of an epoch."""
        return min(self._batch_size, self.rows - batch * self._batch_size)


def _dealt(random: Hashes, first: int, batches: int) -> IntArray:
    """Return the offsets of rows in the order of batches, (batches, positions), from the rows' random numbers."""
    if not batches:
        return np.empty((0, 0), np.int64)
    dealt = np.argsort(random.reshape(-1, batches), axis=1)
    dealt += np.arange(first, first + len(random), batches)[:, None]
    return np.ascontiguousarray(dealt.T)


def _random_numbers(seed: int, epoch: int, what: int, start: int, count: int) -> Hashes:
    """Return the random numbers of the row groups or rows (``what``) [start, start + count): (count,) uint64."""
    return hash_counters((seed << 64) + 2 * epoch + what, start, count)
