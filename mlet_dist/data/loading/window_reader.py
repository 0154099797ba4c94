"""The rows of a rank's windows, from row groups that are decoded ahead in several threads, each of them once."""

from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator

import numpy as np

from mlet_dist.data.loading.order import Order, Window
from mlet_dist.data.loading.prefetch import map_ahead
from mlet_dist.data.loading.row_groups import SplitRows
from mlet_dist.data.loading.windows import Rows


def read_windows(
    parts: SplitRows, order: Order, epoch: int, first_batch: int, threads: int
) -> Generator[tuple[Window, Rows], None, None]:
    """Each window of ``order`` with its rows, from the window of ``first_batch`` on.

    Row groups of one window are decoded ahead, so that they are there when the batches of the one before are taken.
    """
    groups = order.groups(epoch)
    starts = np.concatenate([[0], np.cumsum(parts.group_rows[groups])]).tolist()

    def touched(window: Window) -> range:
        """Places of its row groups in the epoch's sequence of them."""
        if window.start == window.stop:
            return range(0)
        return range(bisect_right(starts, window.start) - 1, bisect_right(starts, window.stop - 1))

    def needed() -> Iterator[int]:
        following = 0  # windows ascend; two of them may share the row group on their border
        for window in order.windows(epoch, first_batch):
            for place in touched(window):
                if place >= following:
                    following = place + 1
                    yield place

    def decode(place: int) -> tuple[int, Rows]:
        return place, parts.decode(groups[place])

    ahead = threads + 1 + order.window_rows * len(groups) // max(1, order.rows)
    decoded = map_ahead(decode, needed(), threads=threads, ahead=ahead)
    held: deque[tuple[int, Rows]] = deque()
    try:
        for window in order.windows(epoch, first_batch):
            places = touched(window)
            while places and held and held[0][0] < places[0]:
                held.popleft()
            while places and (not held or held[-1][0] < places[-1]):
                held.append(next(decoded))
            pieces = [
                rows.slice(max(0, window.start - starts[place]), min(len(rows), window.stop - starts[place]))
                for place, rows in held
                if place in places
            ]
            yield window, pieces[0].join(pieces[1:]) if pieces else parts.empty()
    finally:
        decoded.close()
