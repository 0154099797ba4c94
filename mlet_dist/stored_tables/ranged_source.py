"""Tables with row ranges on disk: their rows are in pools that all tables share, and each range has a W2 of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_collections
from mlet_dist.models.spec import EmbeddingTable, ModelSpec
from mlet_dist.stored_tables.table_source import LocatedRows, TableSource, projection_name


@dataclass(frozen=True)
class RangedTableSource(TableSource):
    """A table with row ranges, read as one of W1 ``(n, k)`` and W2 ``(k, d)`` with k the sum of the ranges' widths.

    The rows of a range have values in its own columns of W1 alone, and the W2 of the ranges lie below one another; that
    of a range of width d is the identity. The product is that of the ranges.

    Attributes:
        ranges: of the table.
        pools: for each range the name of its pool in the files, its first row there, and the order in which the pool's
            rows are stored, None for the order of rows; None if the range is not stored.
        shares_row: whether a last range that is not stored reads the row before it.
    """

    ranges: tuple[RowRange, ...]
    pools: tuple[tuple[str, int, RowOrder | None] | None, ...]
    shares_row: bool = False

    @property
    def shared_row(self) -> int | None:
        """The id of the row that ids of a last range that is not stored read; None if they read zero."""
        if not self.shares_row or self.ranges[-1].width:
            return None
        return self.num_embeddings - self.ranges[-1].rows - 1

    @property
    def stored_bytes(self) -> int:
        """Bytes of the ranges' rows and of their W2, as stored."""
        rows = sum(each.rows * each.width * self.rows_dtype.itemsize for each in self.ranges)
        projected = sum(each.width for each in self.ranges if each.width != self.embedding_dim)
        return rows + 4 * projected * self.embedding_dim

    def projection_of(self, index: int) -> torch.Tensor:
        """Return W2 ``(width, d)`` of a range."""
        assert self.projection is not None
        first = sum(each.width for each in self.ranges[:index])
        return self.projection[first : first + self.ranges[index].width]

    @property
    def projections(self) -> dict[int, tuple[str, torch.Tensor]]:
        """The name in the state dict and the values ``(w, d)`` of each W2, by w."""
        return {
            each.width: (projection_name(self.tables_prefix, f"{self.name}:{index}"), self.projection_of(index))
            for index, each in enumerate(self.ranges)
            if each.width not in (0, self.embedding_dim)
        }

    def locate(self, ids: torch.Tensor) -> list[LocatedRows]:
        """Return where the rows of ``ids`` are stored, ``(n,)`` int64; none for those that read zero."""
        ids = ids if self.shared_row is None else ids.clamp(max=self.shared_row)
        found, first = [], 0
        for index, (each, pool) in enumerate(zip(self.ranges, self.pools, strict=True)):
            if pool is not None:
                name, offset, order = pool
                positions = ((ids >= first) & (ids < first + each.rows)).nonzero().squeeze(1)
                rows = ids[positions] - first + offset
                has_w2 = each.width != self.embedding_dim
                found.append(
                    LocatedRows(
                        positions,
                        name,
                        rows if order is None else order.stored_rows(rows),
                        each.width,
                        projection_name(self.tables_prefix, f"{self.name}:{index}") if has_w2 else None,
                        self.projection_of(index) if has_w2 else None,
                    )
                )
            first += each.rows
        return found

    def select(self, name: str, indices: Sequence[int], *, zero_row: bool, collapsed: bool) -> "RangedTableSource":
        """Return a table of some of the ranges.

        Args:
            name: of the table.
            indices: the numbers of the ranges, ascending; only one if it is not collapsed.
            zero_row: whether a row that is zero follows.
            collapsed: whether the rows have d columns, W1·W2. Otherwise they are W1 of the range, as a single layer.
        """
        ranges = [self.ranges[index] for index in indices] + [RowRange(1, 0)] * zero_row
        width = sum(each.width for each in ranges)
        projections = [self.projection_of(index) for index in indices]
        return replace(
            self,
            name=name,
            state_name=f"{self.tables_prefix}embedding_bags.{name}.weight",
            num_embeddings=sum(each.rows for each in ranges),
            hidden_dim=width if collapsed else None,
            embedding_dim=self.embedding_dim if collapsed else width,
            projection=torch.cat(projections) if collapsed else None,
            ranges=tuple(ranges),
            pools=(*(self.pools[index] for index in indices), *[None] * zero_row),
            shares_row=False,
        )

    def stored_rows(self, start: int, stop: int) -> torch.Tensor | None:
        """Return which rows of ``[start, stop)`` are in a range whose width is not 0."""
        stored = torch.ones(stop - start, dtype=torch.bool)
        first = 0
        for each in self.ranges:
            if not each.width:
                stored[max(first - start, 0) : max(first + each.rows - start, 0)] = False
            first += each.rows
        return None if bool(stored.all()) else stored

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from ``start`` on."""
        rows.zero_()
        first, column = 0, 0
        for each, pool in zip(self.ranges, self.pools, strict=True):
            begin, end = max(start, first), min(start + rows.shape[0], first + each.rows)
            if pool is not None and begin < end:
                name, offset, order = pool
                of_range = torch.empty(end - begin, each.width, dtype=self.rows_dtype)
                self.read_by_id(name, order, offset + begin - first, of_range)
                rows[begin - start : end - start, column : column + each.width] = of_range
            first += each.rows
            column += each.width
        shared = self.shared_row
        if shared is not None and start + rows.shape[0] > shared + 1:
            row = torch.empty(1, rows.shape[1], dtype=self.rows_dtype)
            self.read_into(shared, row)
            rows[max(shared + 1 - start, 0) :] = row


Pool = tuple[str, tuple[int, int], int, RowOrder | None]
"""The pool of a segment: its state name, its shape, the first row of the segment, and the order of its rows."""


def pools_of(spec: ModelSpec, *, spread: bool) -> dict[str, Pool]:
    """Return the pool of each segment by name; ``spread`` as in open_tables."""
    collection = build_collections(spec, torch.device("meta")).bags
    assert isinstance(collection, MultiLayerEmbeddingBagCollection)
    stored = collection.row_tables()
    return {
        segment.name: (
            f"{spec.tables_prefix}embedding_bags.{table.name}.weight",
            (table.num_embeddings, table.row_width),
            segment.offset,
            table.row_order if spread else None,
        )
        for table in stored
        for segment in table.segments
    }


def open_ranged_table(
    table: EmbeddingTable,
    spec: ModelSpec,
    pools: Mapping[str, Pool],
    files: ChunkedTensors,
    prefix: str,
) -> TableSource:
    """Return a table with row ranges after checking the shapes of its pools and of every W2."""
    name, d = table.name, table.embedding_dim
    ranges = tuple(RowRange(*each) for each in spec.row_ranges[name])
    where: list[tuple[str, int, RowOrder | None] | None] = []
    projections, dtype = [], torch.float32
    for index, each in enumerate(ranges):
        if not each.width:
            where.append(None)
            continue
        state_name, shape, offset, order = pools[f"{name}:{index}"]
        pool = files.tensors.get(f"{prefix}{state_name}")
        if pool is None or pool.shape != shape:
            found = "missing" if pool is None else f"{pool.shape}"
            raise UserError(f"{files.location}: {state_name!r} is {found} in the files and {shape} in the model")
        where.append((f"{prefix}{state_name}", offset, order))
        dtype = pool.dtype
        if each.width == d:
            projections.append(torch.eye(d))
            continue
        projection = files.load(f"{prefix}{projection_name(spec.tables_prefix, f'{name}:{index}')}").float()
        if projection.shape != (each.width, d):
            raise UserError(
                f"{files.location}: the W2 of rows of {each.width} columns of table {name!r} is "
                f"{tuple(projection.shape)}, it must be {(each.width, d)}"
            )
        projections.append(projection)
    state_name = f"{spec.tables_prefix}embedding_bags.{name}.weight"
    rows, width = sum(each.rows for each in ranges), sum(each.width for each in ranges)
    return RangedTableSource(
        name,
        state_name,
        rows,
        width,
        d,
        torch.cat(projections),
        dtype,
        "",
        files,
        ranges,
        tuple(where),
        spec.shared_rows,
    )
