"""The rows of a table that are stored, and the table of these rows alone."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.stored_tables.table_source import TableSource

_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True)
class KeptRows:
    """The rows of a table that are stored, numbered from 0 in the order of their ids.

    Ids of other rows get the number ``count``, that of a row behind the kept rows: zero, or the table's shared row.

    Attributes:
        num_embeddings: n of the table.
        count: the number of kept rows.
        ids: theirs, ascending ``(count,)`` int64; None if they are the first rows of the table.
    """

    num_embeddings: int
    count: int
    ids: torch.Tensor | None = None

    @classmethod
    def of(cls, table: TableSource) -> Self:
        """Return the kept rows of a table; takes 8 bytes for each unless they are its first rows."""
        if table.shared_row is not None:
            return cls(table.num_embeddings, table.shared_row)
        count, parts = 0, list[torch.Tensor]()
        for start in range(0, table.num_embeddings, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, table.num_embeddings)
            stored = table.stored_rows(start, stop)
            kept = stop - start if stored is None else int(stored.sum())
            first_rows = stored is None or bool(stored[:kept].all())
            if kept and not parts and not (first_rows and count == start):
                parts.append(torch.arange(count))
            if parts:
                parts.append(start + (torch.arange(kept) if stored is None else stored.nonzero()[:, 0]))
            count += kept
        return cls(table.num_embeddings, count, torch.cat(parts) if parts else None)

    @property
    def rows(self) -> int:
        """The rows of a table that holds the kept rows, and the zero row if there are ids that need it."""
        return self.count + (self.count < self.num_embeddings)

    def renumber(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the numbers of ``ids``, int64 below ``num_embeddings``."""
        if self.ids is None:
            return ids.clamp(max=self.count)
        position = torch.searchsorted(self.ids, ids)
        found = self.ids[position.clamp(max=self.count - 1)] == ids
        return torch.where(found, position, self.count)

    def id_of(self, number: int) -> int:
        """Return the id of a kept row; for the zero row, the first id that stands for it."""
        if self.ids is None:
            return number
        if number < self.count:
            return int(self.ids[number])
        gaps = (self.ids != torch.arange(self.count)).nonzero()
        return int(gaps[0]) if len(gaps) else self.count


@dataclass(frozen=True)
class KeptTableSource(TableSource):
    """The kept rows of a table, followed by the zero row if there are ids that need it."""

    whole: TableSource
    kept: KeptRows

    @classmethod
    def of(cls, table: TableSource, kept: KeptRows) -> "KeptTableSource":
        """Return the kept rows of ``table``."""
        return cls(
            table.name,
            table.state_name,
            kept.rows,
            table.hidden_dim,
            table.embedding_dim,
            table.projection,
            table.rows_dtype,
            table.stored_name,
            table._files,
            table,
            kept,
        )

    def with_files(self, files: ChunkedTensors) -> Self:
        """Return a copy that reads from other open files."""
        return replace(self, _files=files, whole=self.whole.with_files(files))

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from number ``start`` on."""
        shared = int(self.whole.shared_row is not None)  # it is the row after the kept ones
        wanted = min(len(rows), self.kept.count + shared - start)
        rows[wanted:] = 0
        if self.kept.ids is None:
            if wanted:
                self.whole.read_into(start, rows[:wanted])
            return
        ids = self.kept.ids[start : start + wanted]
        done = 0
        while done < wanted:  # rows that are not kept are read, too, but never more at a time than `rows` takes
            first = int(ids[done])
            stop = int(torch.searchsorted(ids, first + len(rows)))
            block = torch.empty(int(ids[stop - 1]) + 1 - first, rows.shape[1], dtype=rows.dtype)
            self.whole.read_into(first, block)
            rows[done:stop] = block[ids[done:stop] - first]
            done = stop
