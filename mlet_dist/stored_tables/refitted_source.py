"""A table on disk with other widths of its rows, computed as it is read: what an export of another size holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.stored_tables.ranged_source import RangedTableSource
from mlet_dist.stored_tables.table_source import TableSource

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class RefittedTableSource(RangedTableSource):
    """A table whose rows have the widths of ``ranges``, in orthonormal directions that each range has of its own.

    A row of width w is v·P2ᵀ, where v is its vector in the table on disk and P2 ``(w, d)`` are the directions: then
    v·P2ᵀ·P2 is the vector closest to v that rows of the range can have. Rows of d columns are the vectors themselves.

    Attributes:
        whole: the table on disk.
        directions: P2 float32 by the name of a pool, which is the number of a range; none of ranges of width d.
        shared: the id and the vector ``(d,)`` float32 of the row that ids of a last range of width 0 read; None if
            they read zero.
    """

    whole: TableSource = field(kw_only=True)
    directions: Mapping[str, torch.Tensor] = field(kw_only=True)
    shared: tuple[int, torch.Tensor] | None = field(kw_only=True)

    @classmethod
    def of(
        cls,
        whole: TableSource,
        ranges: Sequence[RowRange],
        directions: Sequence[torch.Tensor | None],
        shared: torch.Tensor | None = None,
    ) -> "RefittedTableSource":
        """Return a table with other widths.

        Args:
            whole: the table on disk.
            ranges: of all its rows; only the last one may have width 0.
            directions: for each range P2 ``(w, d)`` float32; None for width d or 0.
            shared: the vector of the last row that is stored, which the ids behind it then read, too.
        """
        d = whole.embedding_dim
        named, projections = {}, []
        for index, (each, own) in enumerate(zip(ranges, directions, strict=True)):
            if own is not None:
                named[str(index)] = own
            if each.width:
                projections.append(torch.eye(d) if own is None else own)
        starts = [sum(each.rows for each in ranges[:index]) for index in range(len(ranges))]
        kept = sum(each.rows for each in ranges if each.width)
        return cls(
            name=whole.name,
            state_name=whole.state_name,
            num_embeddings=whole.num_embeddings,
            hidden_dim=sum(each.width for each in ranges),
            embedding_dim=d,
            projection=torch.cat(projections),
            rows_dtype=torch.float32,
            stored_name=whole.stored_name,
            _files=whole._files,
            ranges=tuple(ranges),
            pools=tuple((str(index), starts[index], None) if each.width else None for index, each in enumerate(ranges)),
            shares_row=shared is not None,
            whole=whole,
            directions=named,
            shared=None if shared is None else (kept - 1, shared),
        )

    def with_files(self, files: ChunkedTensors) -> Self:
        """Return a copy that reads from other open files."""
        return replace(self, _files=files, whole=self.whole.with_files(files))

    def read_by_id(self, name: str, order: RowOrder | None, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows of ids from ``start`` on in the directions of range number ``name``."""
        for first in range(0, len(rows), _BLOCK_ROWS):
            out = rows[first : first + _BLOCK_ROWS]
            vectors = vectors_of_ids(self.whole, start + first, start + first + len(out))
            if self.shared is not None and start + first <= self.shared[0] < start + first + len(out):
                vectors[self.shared[0] - start - first] = self.shared[1].double()
            own = self.directions.get(name)
            out.copy_(vectors if own is None else vectors @ own.double().T)


def vectors_of_ids(table: TableSource, start: int, stop: int) -> torch.Tensor:
    """Return the vectors of ids ``[start, stop)`` of a table ``(n, d)`` float64.

    Raises:
        UserError: a file is missing or damaged.
    """
    rows = table.read_stored(start, stop).double()
    return rows if table.projection is None else rows @ table.projection.double()
