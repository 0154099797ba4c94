"""Adaptive tables on disk: their rows are in slots of pools, and a tensor of the checkpoint says which row is where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.export.table_source import TableSource
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.models.spec import ModelSpec

_GAP = 64  # slots that are read and thrown away rather than begin another read


@dataclass(frozen=True)
class PoolSource:
    """The rows of a part of a table in one pool (``SlotLayout``).

    Attributes:
        first_row: the number of the part's first row.
        name: of the pool in the files.
        width: its columns.
        first_code: the code of its first slot.
        slots: their number.
        first_column: where the pool's columns are in the table's W1.
    """

    first_row: int
    name: str
    width: int
    first_code: int
    slots: int
    first_column: int


@dataclass(frozen=True)
class AdaptiveTableSource(TableSource):
    """An adaptive table, read as one of W1 ``(n, k)`` and W2 ``(k, d)`` with k the sum of the widths of its pools.

    A whole row has values in the columns of its pool alone, and the W2 of the pools lie below one another; that of a
    pool of width d is the identity. A row cut into chunks has values in the columns of the chunks that have a slot.
    Rows without slot are zero.

    Attributes:
        pools: that may hold rows, or chunks of rows, of the table.
        slots_name: the name of the slots of all rows in the files.
        num_buckets: rows in a line of the slots.
    """

    pools: tuple[PoolSource, ...]
    slots_name: str
    num_buckets: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the rows that have a slot, and of every W2, as stored."""
        rows = 0
        for first_row, pools in self._parts():
            codes = self._codes(first_row, 0, self.num_embeddings)
            rows += sum(int(self._inside(codes, pool).sum()) * pool.width for pool in pools) * self.rows_dtype.itemsize
        projected = sum(pool.width for pool in self.pools if pool.width != self.embedding_dim)
        return rows + 4 * projected * self.embedding_dim

    def stored_rows(self, start: int, stop: int) -> torch.Tensor | None:
        """Return which rows of ``[start, stop)`` have a slot."""
        stored = torch.zeros(stop - start, dtype=torch.bool)
        for first_row, _ in self._parts():
            stored |= self._codes(first_row, start, stop) >= 0
        return None if bool(stored.all()) else stored

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from ``start`` on.

        Raises:
            UserError: a file is missing or damaged, or a row has a slot that is none of its table's pools'.
        """
        rows.zero_()
        for first_row, pools in self._parts():
            self._read_part(first_row, pools, start, rows)

    def _read_part(self, first_row: int, pools: Sequence[PoolSource], start: int, rows: torch.Tensor) -> None:
        codes = self._codes(first_row, start, start + len(rows))
        known = codes < 0
        for pool in pools:
            inside = self._inside(codes, pool)
            known |= inside
            positions = inside.nonzero().squeeze(1)
            slots, order = (codes[positions] - pool.first_code).sort()
            columns = slice(pool.first_column, pool.first_column + pool.width)
            for first, begin, end in _runs(slots):
                read = torch.empty(int(slots[end - 1]) + 1 - first, pool.width, dtype=self.rows_dtype)
                self._files.read_rows(pool.name, first, read)
                rows[positions[order[begin:end]], columns] = read[slots[begin:end] - first]
        if not bool(known.all()):
            row = start + int(known.int().argmin())
            raise UserError(
                f"{self.location}: row {row:,} of table {self.name!r} has slot {int(codes[row - start])}, none "
                "of its table"
            )

    def _parts(self) -> list[tuple[int, list[PoolSource]]]:
        """Return the number of the first row of each part, and its pools."""
        found: dict[int, list[PoolSource]] = {}
        for pool in self.pools:
            found.setdefault(pool.first_row, []).append(pool)
        return list(found.items())

    def _codes(self, first_row: int, start: int, stop: int) -> torch.Tensor:
        """Return the codes of the slots of rows ``[start, stop)`` of a part, -1 for none."""
        first, last = first_row + start, first_row + stop
        line = first // self.num_buckets
        lines = torch.empty(-(-last // self.num_buckets) - line, self.num_buckets, dtype=torch.int32)
        self._files.read_rows(self.slots_name, line, lines)
        return lines.view(-1)[first - line * self.num_buckets : last - line * self.num_buckets].long()

    @staticmethod
    def _inside(codes: torch.Tensor, pool: PoolSource) -> torch.Tensor:
        return (codes >= pool.first_code) & (codes < pool.first_code + pool.slots)


def _runs(slots: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (first slot, begin, end) of runs of ascending slots that are read together."""
    if not len(slots):
        return
    ends = [*(slots.diff() > _GAP).nonzero().squeeze(1).add(1).tolist(), len(slots)]
    begin = 0
    for end in ends:
        yield int(slots[begin]), begin, end
        begin = end


def open_adaptive_tables(spec: ModelSpec, files: ChunkedTensors, prefix: str) -> dict[str, TableSource]:
    """Return the adaptive tables of a model after checking the shapes of the pools, the slots and every W2.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    meta = torch.device("meta")
    collection = build_dlrm(spec, meta, dense_device=meta).sparse_arch.embedding_bag_collection
    tables = {table.name: table for table in collection.embedding_bag_configs() if table.row_ranges is not None}
    chunk_width = collection.adaptive.chunk_width
    layout = SlotLayout.of(list(tables.values()), chunk_width)
    slots_name = f"{prefix}{TABLES_PREFIX}row_slots.slots"
    _check_shape(files, slots_name, (layout.num_chunks * layout.rows_per_bucket, layout.num_buckets))
    names = {}
    for table in collection.row_tables():
        if table.num_buckets:
            names[table.row_width] = f"{prefix}{TABLES_PREFIX}embedding_bags.{table.name}.weight"
            _check_shape(files, names[table.row_width], (table.num_embeddings, table.row_width))
    first_codes, first_rows = layout.first_codes().tolist(), layout.first_rows().tolist()
    found: dict[str, TableSource] = {}
    for index, (name, table) in enumerate(tables.items()):
        pools: list[PoolSource] = []
        projections = []
        for part in range(index, layout.num_parts, len(tables)):
            for number, pool in enumerate(layout.pools):
                if pool.width not in layout.permitted_widths[part]:
                    continue
                column = sum(each.width for each in pools)
                slots = layout.slots(number)
                pools.append(
                    PoolSource(first_rows[part], names[pool.width], pool.width, first_codes[number], slots, column)
                )
                which = _projection_index(table, pool.width, part // len(tables), chunk_width)
                projections.append(_projection(files, prefix, table, which, pool.width, column))
        found[name] = AdaptiveTableSource(
            name,
            f"{TABLES_PREFIX}embedding_bags.{name}.weight",
            table.num_embeddings,
            sum(pool.width for pool in pools),
            table.embedding_dim,
            torch.cat(projections),
            files.tensors[pools[0].name].dtype,
            "",
            files,
            tuple(pools),
            slots_name,
            layout.num_buckets,
        )
    return found


def _projection_index(
    table: MultiLayerEmbeddingBagConfig, width: int, chunk: int, chunk_width: int | None
) -> int | None:
    """Return the number of the W2 of whole rows of a width, or of a chunk; None if there is none."""
    if chunk_width is not None:
        return None if table.hidden_dim is None else chunk
    of_widths = [each.width for each in table.row_ranges or ()]
    return None if width == table.embedding_dim else of_widths.index(width)


def _projection(
    files: ChunkedTensors, prefix: str, table: MultiLayerEmbeddingBagConfig, index: int | None, width: int, column: int
) -> torch.Tensor:
    """Return a W2 ``(width, d)``; rows of the identity if there is none, for chunks those of their columns."""
    if index is None:
        first = 0 if width == table.embedding_dim else column
        return torch.eye(table.embedding_dim)[first : first + width]
    name = f"{prefix}{TABLES_PREFIX}projections.{table.name}:{index}.weight"
    _check_shape(files, name, (width, table.embedding_dim))
    return files.load(name).float()


def _check_shape(files: ChunkedTensors, name: str, shape: tuple[int, ...]) -> None:
    tensor = files.tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"{tensor.shape}"
        raise UserError(f"{files.location}: {name!r} is {found} in the files and {shape} in the model")
