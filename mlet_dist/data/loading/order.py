"""The order in which an epoch visits the rows of a split, and each rank's share of every batch.

Without shuffling, global batch g is rows [g·B, (g+1)·B) of the split in file order, and rank r of R takes rows
[r·b, (r+1)·b) of it, b = B/R.

With shuffling, the split's row groups are permuted, and the sequence of their rows is cut into windows of m·B rows. m
is what the shuffle buffer allows, but at least 2, since a window of one batch would shuffle nothing. A window makes m
batches: its rows [p·m, (p+1)·m) are dealt in random order, one to each batch, all to position p. So rank r's part of a
window is the contiguous range of rows [r·b·m, (r+1)·b·m), and a rank decodes no row groups of other ranks except those
on the borders of its range.

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
        batches: number of batches that the window makes.
        skipped: number of its batches that come before the first one requested.
    """

    start: int
    stop: int
    batches: int = 1
    skipped: int = 0


class Order:
    """The order of one rank's rows in every epoch.

    Args:
        group_rows: (G,) number of rows of each row group of the split, in file order.
        batch_size: rows of a global batch (B), a multiple of ``world_size``.
        rank, world_size: r and R.
        drop_last: True drops an incomplete last batch; False keeps it, so that every row is visited once.
        shuffle: None keeps file order. Shuffling requires ``drop_last``.

    Attributes:
        rows: number of rows of the split.
        batches: number of batches per epoch, the same on every rank.
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
        drop_last: bool,
        shuffle: Shuffle | None,
    ) -> None:
        if shuffle is not None and not drop_last:
            raise ValueError("rows are shuffled only where the incomplete last batch is dropped")
        self.rows = int(group_rows.sum())
        self.batches = self.rows // batch_size if drop_last else -(-self.rows // batch_size)
        self.mixes = shuffle is not None and (self.batches > 1 or np.count_nonzero(group_rows) > 1)
        self._group_rows, self._shuffle = group_rows, shuffle
        self._batch_size, self._local_size = batch_size, batch_size // world_size
        self._first = rank * self._local_size
        self._batches_per_window = 1
        if shuffle is not None:
            self._batches_per_window = max(1, min(max(2, shuffle.buffer_rows // batch_size), self.batches))
        self.window_rows = self._batches_per_window * self._local_size

    def groups(self, epoch: int) -> IntArray:
        """Return the numbers of the row groups, (G,), in the order of ``epoch``."""
        count = len(self._group_rows)
        if self._shuffle is None:
            return np.arange(count)
        return np.argsort(_random_numbers(self._shuffle.seed, epoch, _GROUPS, 0, count))

    def windows(self, epoch: int, first_batch: int) -> Iterator[Window]:
        """Yield the rank's windows of ``epoch`` from the one with ``first_batch`` on; positions ascend."""
        step = self._batches_per_window
        for batch in range(first_batch - first_batch % step, self.batches, step):
            count = min(step, self.batches - batch)
            start = min(batch * self._batch_size + self._first * count, self.rows)
            stop = min(start + self._local_size * count, self.rows)
            yield Window(start, stop, count, max(0, first_batch - batch))

    def picks(self, epoch: int, window: Window) -> Iterator[IntArray | None]:
        """Yield the rows of each batch of the window, as offsets from ``window.start``; None is all rows in order."""
        if self._shuffle is None:
            yield None
            return
        random = _random_numbers(self._shuffle.seed, epoch, _ROWS, window.start, window.stop - window.start)
        dealt = np.argsort(random.reshape(self._local_size, window.batches), axis=1)
        dealt += np.arange(0, len(random), window.batches)[:, None]
        yield from np.ascontiguousarray(dealt.T[window.skipped :])


def _random_numbers(seed: int, epoch: int, what: int, start: int, count: int) -> Hashes:
    """Return the random numbers of the row groups or rows (``what``) [start, start + count): (count,) uint64."""
    return hash_counters((seed << 64) + 2 * epoch + what, start, count)
