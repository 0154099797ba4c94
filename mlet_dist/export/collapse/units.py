"""The pieces of work that an export consists of: ranges of rows of its tables."""

from collections.abc import Iterable
from dataclasses import dataclass

from mlet_dist.embeddings.collapse import block_rows
from mlet_dist.export.source import TableSource

UNIT_BYTES = 1 << 26
"""Of W in float32, about: what is done again after a kill, and what a file holds."""


@dataclass(frozen=True)
class Unit:
    """Rows ``[start, stop)`` of a table; the ``index``-th of ``count`` units of it."""

    table: str
    index: int
    count: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Of its files, without the suffix."""
        return f"{self.table}-{self.index:05}-of-{self.count:05}"


def units_of(tables: Iterable[TableSource]) -> list[Unit]:
    """All units, by table. They follow from the tables alone, so the files are the same for any number of ranks."""
    units = []
    for table in tables:
        step = unit_rows(table)
        count = -(-table.num_embeddings // step)
        for index in range(count):
            start = index * step
            units.append(Unit(table.name, index, count, start, min(start + step, table.num_embeddings)))
    return units


def unit_rows(table: TableSource) -> int:
    """Rows of a table's units, a multiple of those that are multiplied at a time."""
    block = block_rows(table.hidden_dim or 1, table.embedding_dim)
    return max(1, UNIT_BYTES // (4 * table.embedding_dim * block)) * block
