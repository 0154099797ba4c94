"""A group: consecutive chunks of one file, the unit in which values are counted and parts are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlet_dist.data.prepare.chunks import TIME, load_chunk, load_times
from mlet_dist.data.prepare.splits import Codes, Splitter

GROUP_ROWS = 1 << 18


@dataclass(frozen=True)
class Group:
    """Chunks of a file.

    Attributes:
        number: among all groups of all files, in row order.
        file: number of the file.
        chunks: their files, in row order.
        start: the file's rows before them.
        rows: how many rows they hold.
    """

    number: int
    file: int
    chunks: tuple[Path, ...]
    start: int
    rows: int

    def read(self, splitter: Splitter, columns: Sequence[str] | None = None) -> Iterator[tuple[pa.Table, Codes]]:
        """Yield each chunk's rows, or these columns of them, and the splits that the rows belong to."""
        start = self.start
        for path in self.chunks:
            table = load_chunk(path, columns)
            times: npt.NDArray[np.int64] | None = None
            if splitter.rule.by == "time":
                times = table[TIME].to_numpy() if TIME in table.column_names else load_times(path)
            yield table, splitter.codes(self.file, start, table.num_rows, times)
            start += table.num_rows


def make_groups(files: Sequence[Sequence[tuple[Path, int]]]) -> list[Group]:
    """The groups of files whose chunks, with the rows of each, are given."""
    groups: list[Group] = []
    for number, chunks in enumerate(files):
        start, pending, rows = 0, [], 0
        for index, (path, count) in enumerate(chunks):
            pending.append(path)
            rows += count
            if rows >= GROUP_ROWS or index == len(chunks) - 1:
                groups.append(Group(len(groups), number, tuple(pending), start, rows))
                start, pending, rows = start + rows, [], 0
    return groups
