"""Writes rows that arrive in order as the Parquet parts of the train, valid and test splits."""

import hashlib
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlet_dist.data.schema import SPLITS, Part
from mlet_dist.errors import UserError

PART_ROWS = 1 << 20
# Small, so that a rank can pass over the rows of the other ranks without decoding them.
ROW_GROUP_ROWS = 1 << 14
PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}
MIN_ROWS = 10


def split_bounds(rows: int) -> dict[str, tuple[int, int]]:
    """First row and end row of each split: the first 80% of ``rows``, the next 10%, the last 10%."""
    bounds = (0, rows * 8 // 10, rows * 9 // 10, rows)
    return dict(zip(SPLITS, pairwise(bounds), strict=True))


class PartWriter:
    """Takes the rows of a data set in order and writes them to the split that their position says.

    Holds at most one part's rows (``PART_ROWS``) in memory.

    Args:
        directory: the data set's directory.
        rows: how many rows will come.
        label: name of the label column.

    Raises:
        UserError: there are too few rows to have three splits.
    """

    def __init__(self, directory: Path, rows: int, label: str) -> None:
        if rows < MIN_ROWS:
            raise UserError(
                f"{rows} rows are too few to split into train, valid and test; at least {MIN_ROWS} are needed"
            )
        self.parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
        self._directory, self._label = directory, label
        self._bounds = split_bounds(rows)
        self._position = 0
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        for split in SPLITS:
            (directory / split).mkdir()

    def write(self, table: pa.Table) -> None:
        """Append the next rows."""
        while table.num_rows:
            split, stop = next((s, stop) for s, (_, stop) in self._bounds.items() if self._position < stop)
            rows = table.slice(0, min(stop - self._position, PART_ROWS - self._pending_rows))
            table = table.slice(rows.num_rows)
            self._pending.append(rows)
            self._pending_rows += rows.num_rows
            self._position += rows.num_rows
            if self._pending_rows == PART_ROWS or self._position == stop:
                self._flush(split)

    def _flush(self, split: str) -> None:
        table = pa.concat_tables(self._pending)
        path = f"{split}/part-{len(self.parts[split]):05}.parquet"
        file = self._directory / path
        write_parquet(table, file)
        positives = pc.sum(table[self._label]).as_py()
        self.parts[split].append(Part(path, table.num_rows, positives, file.stat().st_size, sha256_of(file)))
        self._pending, self._pending_rows = [], 0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one Parquet file with small row groups and page checksums."""
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, **PARQUET_OPTIONS)
