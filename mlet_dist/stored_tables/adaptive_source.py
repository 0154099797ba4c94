"""Adaptive tables on disk: their rows are in slots of pools, and a tensor of the checkpoint says which row is where."""

from dataclasses import dataclass

import torch
from torchrec.distributed.utils import none_throws

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_collections
from mlet_dist.models.spec import ModelSpec
from mlet_dist.stored_tables.table_source import LocatedRows, TableSource, projection_name


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
        projection_name: of the part's W2 for the pool; None if there is none.
    """

    first_row: int
    name: str
    width: int
    first_code: int
    slots: int
    first_column: int
    projection_name: str | None


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
        is_chunked: whether rows are cut into chunks.
    """

    pools: tuple[PoolSource, ...]
    slots_name: str
    num_buckets: int
    is_chunked: bool

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

    @property
    def projections(self) -> dict[int, tuple[str, torch.Tensor]]:
        """The name in the state dict and the values ``(w, d)`` of each W2 of whole rows, by w."""
        if self.is_chunked:
            return {}
        return {pool.width: (pool.projection_name, self._of(pool)) for pool in self.pools if pool.projection_name}

    def locate(self, ids: torch.Tensor) -> list[LocatedRows]:
        """Return where the rows of ascending ``ids`` are stored, ``(n,)`` int64; none for those without slot.

        Raises:
            UserError: as for ``read_into``.
        """
        return [located for located, _ in self._located(ids)]

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from ``start`` on.

        Raises:
            UserError: a file is missing or damaged, or a row has a slot that is none of its table's pools'.
        """
        rows.zero_()
        for located, pool in self._located(torch.arange(start, start + len(rows))):
            columns = slice(pool.first_column, pool.first_column + pool.width)
            rows[located.positions, columns] = self.read_located(pool.name, located.stored_rows)

    def _located(self, ids: torch.Tensor) -> list[tuple[LocatedRows, PoolSource]]:
        """Return the rows of ascending ids by part and pool."""
        found = []
        start, stop = (int(ids[0]), int(ids[-1]) + 1) if len(ids) else (0, 0)
        for first_row, pools in self._parts():
            codes = self._codes(first_row, start, stop)[ids - start]
            known = codes < 0
            for pool in pools:
                inside = self._inside(codes, pool)
                known |= inside
                positions = inside.nonzero().squeeze(1)
                slots = codes[positions] - pool.first_code
                projection = self._of(pool) if self.is_chunked or pool.projection_name is not None else None
                located = LocatedRows(positions, pool.name, slots, pool.width, pool.projection_name, projection)
                found.append((located, pool))
            if not bool(known.all()):
                wrong = int(known.int().argmin())
                raise UserError(
                    f"{self.location}: row {int(ids[wrong]):,} of table {self.name!r} has slot {int(codes[wrong])}, "
                    "none of its table"
                )
        return found

    def _of(self, pool: PoolSource) -> torch.Tensor:
        """Return the W2 of a pool; rows of the identity if it has none."""
        assert self.projection is not None
        return self.projection[pool.first_column : pool.first_column + pool.width]

    def _parts(self) -> list[tuple[int, list[PoolSource]]]:
        """Return the number of the first row of each part, and its pools."""
        found: dict[int, list[PoolSource]] = {}
        for pool in self.pools:
            found.setdefault(pool.first_row, []).append(pool)
        return list(found.items())

    def utilities(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the utilities of the rows of ascending ids ``(n,)`` bfloat16; of their first chunks if they are cut.

        Raises:
            UserError: a file is missing or damaged.
        """
        start, stop = (int(ids[0]), int(ids[-1]) + 1) if len(ids) else (0, 0)
        name = f"{self.slots_name.removesuffix('slots')}utilities"
        return self._of_rows(name, torch.bfloat16, self.pools[0].first_row, start, stop)[ids - start]

    def _codes(self, first_row: int, start: int, stop: int) -> torch.Tensor:
        """Return the codes of the slots of rows ``[start, stop)`` of a part, -1 for none."""
        return self._of_rows(self.slots_name, torch.int32, first_row, start, stop).long()

    def _of_rows(self, name: str, dtype: torch.dtype, first_row: int, start: int, stop: int) -> torch.Tensor:
        """Return the values of rows ``[start, stop)`` of a part in a tensor of all rows."""
        first, last = first_row + start, first_row + stop
        line = first // self.num_buckets
        lines = torch.empty(-(-last // self.num_buckets) - line, self.num_buckets, dtype=dtype)
        self._files.read_rows(name, line, lines)
        return lines.view(-1)[first - line * self.num_buckets : last - line * self.num_buckets]

    @staticmethod
    def _inside(codes: torch.Tensor, pool: PoolSource) -> torch.Tensor:
        return (codes >= pool.first_code) & (codes < pool.first_code + pool.slots)


def open_adaptive_tables(spec: ModelSpec, files: ChunkedTensors, prefix: str) -> dict[str, TableSource]:
    """Return the adaptive tables of a model after checking the shapes of the pools, the slots and every W2.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    collection, tables_prefix = build_collections(spec, torch.device("meta")).bags, spec.tables_prefix
    assert isinstance(collection, MultiLayerEmbeddingBagCollection)
    tables = {table.name: table for table in collection.embedding_bag_configs() if table.row_ranges is not None}
    chunk_width = none_throws(collection.adaptive).chunk_width
    layout = SlotLayout.of(list(tables.values()), chunk_width)
    slots_name = f"{prefix}{tables_prefix}row_slots.slots"
    _check_shape(files, slots_name, (layout.num_chunks * layout.rows_per_bucket, layout.num_buckets))
    names = {}
    for table in collection.row_tables():
        if table.num_buckets:
            names[table.row_width] = f"{prefix}{tables_prefix}embedding_bags.{table.name}.weight"
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
                which = _projection_index(table, pool.width, part // len(tables), chunk_width)
                pools.append(
                    PoolSource(
                        first_rows[part],
                        names[pool.width],
                        pool.width,
                        first_codes[number],
                        layout.slots(number),
                        column,
                        None if which is None else projection_name(tables_prefix, f"{name}:{which}"),
                    )
                )
                projections.append(_projection(files, f"{prefix}{tables_prefix}", table, which, pool.width, column))
        found[name] = AdaptiveTableSource(
            name,
            f"{tables_prefix}embedding_bags.{name}.weight",
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
            chunk_width is not None,
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
    name = projection_name(prefix, f"{table.name}:{index}")
    _check_shape(files, name, (width, table.embedding_dim))
    return files.load(name).float()


def _check_shape(files: ChunkedTensors, name: str, shape: tuple[int, ...]) -> None:
    tensor = files.tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"{tensor.shape}"
        raise UserError(f"{files.location}: {name!r} is {found} in the files and {shape} in the model")
