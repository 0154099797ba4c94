"""In which order an epoch visits the rows of a split, and which of them a rank takes.

Without shuffling, global batch g is rows [g·B, (g+1)·B) of the split in file order, and rank r of R takes rows
[r·b, (r+1)·b) of it, b = B/R.

With shuffling, the split's row groups are permuted, and their rows, one group after another, are cut into windows of
m·B rows, m as the buffer allows, but 2 at least: in a window of one batch there would be nothing to mix. A window makes
m batches: its rows [p·m, (p+1)·m) are dealt one to each batch, all to position p, in random order. So rank r's part of
a window is the contiguous rows [r·b·m, (r+1)·b·m), and a rank decodes no row group of another rank but those on its
borders.

Everything follows from seed, epoch and position by hashing: any rank of any world size computes its own part alone, and
no list is longer than the row groups or a rank's part of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlet_dist.data.hashing import Hashes, hash_counters

IntArray = npt.NDArray[np.int64]

_GROUPS, _ROWS = range(2)


@dataclass(frozen=True)
class Shuffle:
    """Permute row groups, and rows within windows of ``buffer_rows`` rows of all ranks, two batches at least."""

    seed: int
    buffer_rows: int


@dataclass(frozen=True)
class Window:
    """A rank's part of consecutive batches.

    Attributes:
        start, stop: a range of positions among the rows of the epoch's sequence of row groups.
        batches: how many it makes.
        skipped: how many of them come before the first that is wanted.
    """

    start: int
    stop: int
    batches: int = 1
    skipped: int = 0


class Order:
    """The order of one rank's rows in every epoch.

    Args:
        group_rows: (G,) rows of each row group of the split, in file order.
        batch_size: B, a multiple of ``world_size``.
        rank, world_size: r and R.
        drop_last: False covers every row once, in a last batch that may be incomplete.
        shuffle: None is file order; not with an incomplete last batch.

    Attributes:
        rows: of the split.
        batches: of an epoch, the same on every rank.
        mixes: whether epochs differ in the rows of their batches; not so with one batch from one row group.
        window_rows: most rows that a window holds on this rank.
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
        self._batches_a_window = 1
        if shuffle is not None:
            self._batches_a_window = max(1, min(max(2, shuffle.buffer_rows // batch_size), self.batches))
        self.window_rows = self._batches_a_window * self._local_size

    def groups(self, epoch: int) -> IntArray:
        """(G,) the row groups' numbers in the order of ``epoch``."""
        count = len(self._group_rows)
        if self._shuffle is None:
            return np.arange(count)
        return np.argsort(_lots(self._shuffle.seed, epoch, _GROUPS, 0, count))

    def windows(self, epoch: int, first_batch: int) -> Iterator[Window]:
        """The rank's part of the batches of ``epoch`` from ``first_batch`` on; positions ascend."""
        most = self._batches_a_window
        for batch in range(first_batch - first_batch % most, self.batches, most):
            count = min(most, self.batches - batch)
            start = min(batch * self._batch_size + self._first * count, self.rows)
            stop = min(start + self._local_size * count, self.rows)
            yield Window(start, stop, count, max(0, first_batch - batch))

    def picks(self, epoch: int, window: Window) -> Iterator[IntArray | None]:
        """For each of the window's batches its rows in order, as offsets from ``window.start``; None is all of them."""
        if self._shuffle is None:
            yield None
            return
        lots = _lots(self._shuffle.seed, epoch, _ROWS, window.start, window.stop - window.start)
        dealt = np.argsort(lots.reshape(self._local_size, window.batches), axis=1)
        dealt += np.arange(0, len(lots), window.batches)[:, None]
        yield from np.ascontiguousarray(dealt.T[window.skipped :])


def _lots(seed: int, epoch: int, what: int, start: int, count: int) -> Hashes:
    """Random numbers of ``count`` row groups or rows from ``start`` on."""
    return hash_counters((seed << 64) + 2 * epoch + what, start, count)
