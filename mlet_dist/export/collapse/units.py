"""A unit of an export: a range of rows of a table, computed from W1 and W2 and encoded in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlet_dist.checkpoint.manifest import BLOCK_BYTES
from mlet_dist.embeddings.collapse import block_rows, collapse_rows
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.encoding import RowOverflow
from mlet_dist.export.outputs import Output
from mlet_dist.export.source import Source, TableSource

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


_READ_BYTES = 1 << 22  # of W1, at a time: they stay in a cache until they are multiplied


class UnitWorker:
    """Does units one after the other in memory of its own; several work side by side, each in its thread.

    Args:
        source: read through files of the worker's own.
        outputs: the forms of W.
        work: takes the files; ``directory`` of an output in it by name.
        device: that multiplies.
    """

    def __init__(
        self,
        source: Source,
        outputs: Sequence[Output],
        work: WorkDirectory,
        directories: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._files = source.files.streaming()
        self._tables = {name: table.through(self._files) for name, table in source.tables.items()}
        self._outputs, self._work, self._directories, self._device = outputs, work, directories, device
        sizes = [_buffer_sizes(table) for table in source.tables.values()]
        self._stored = torch.empty(max(stored for stored, _ in sizes), dtype=torch.uint8)
        self._table = torch.empty(max(table for _, table in sizes), dtype=torch.uint8)

    def do(self, unit: Unit) -> None:
        """Collapse, encode and write the rows of a unit, and record that it is finished.

        Raises:
            UserError: a file is damaged or missing, a value is not finite, or a file cannot be written.
        """
        table = self._tables[unit.table]
        rows = self.collapse(unit)
        pieces: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for output in self._outputs:
            file = f"{unit.name}{output.format.suffix}"
            path = f"{self._directories[output.name]}/{file}"
            try:
                encoded = output.encoding.encode(rows)
            except RowOverflow as error:
                at = unit.start + error.row
                raise UserError(f"table {unit.table!r}, row {at:,}: {output.name} cannot hold it: {error}") from None
            tensors = {f"{table.state_name}{suffix}": tensor for suffix, tensor in encoded.items()}
            with self._work.new_file(path) as stream:
                written = output.format.write(stream, file, unit.start, tensors)
            pieces[output.name] = [piece.to_dict() for piece in written]
            files[path] = stream.checksum.entry()
        self._work.record(unit.name, {"files": files, "pieces": pieces})

    def collapse(self, unit: Unit) -> torch.Tensor:
        """W of a unit's rows, float32, in memory that the next call uses again."""
        table = self._tables[unit.table]
        found = _view(self._table, torch.float32, unit.rows, table.embedding_dim)
        step = read_rows(table)
        for start in range(unit.start, unit.stop, step):
            stop = min(start + step, unit.stop)
            stored = _view(self._stored, table.rows_dtype, stop - start, table.hidden_dim or table.embedding_dim)
            table.read_into(start, stored)
            part = found[start - unit.start : stop - unit.start]
            if table.projection is None:
                part.copy_(stored)
            elif self._device.type == "cpu":
                collapse_rows(stored, table.projection, out=part)
            else:
                part.copy_(collapse_rows(stored.to(self._device), table.projection.to(self._device)))
            if not all(bool(bound.isfinite()) for bound in torch.aminmax(part)):
                self._files.settle()
                raise _not_finite(table, start, stored, part)
        self._files.settle()
        return found

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def worker_bytes(source: Source, outputs: Sequence[Output]) -> int:
    """What a worker holds at most: W1 as it is read, a checked block of two files, W, and W encoded."""
    sizes = [_buffer_sizes(table) for table in source.tables.values()]
    stored, table = (max(each) for each in zip(*sizes, strict=True))
    encoded = 2 * table if any(output.encoding.is_quantised for output in outputs) else 0
    return stored + 2 * BLOCK_BYTES + table + encoded


def _buffer_sizes(table: TableSource) -> tuple[int, int]:
    """Bytes of W1 and of W that a worker holds of a table."""
    stored = min(read_rows(table), table.num_embeddings) * table.row_bytes
    return stored, min(unit_rows(table), table.num_embeddings) * 4 * table.embedding_dim


def read_rows(table: TableSource) -> int:
    """Rows to read at a time, a multiple of those that are multiplied at a time."""
    block = block_rows(table.hidden_dim or 1, table.embedding_dim)
    return min(unit_rows(table), max(1, _READ_BYTES // (table.row_bytes * block)) * block)


def _view(buffer: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """The beginning of a buffer as a matrix that owns all of its storage, as far as torch.save can see."""
    values = buffer.numpy()[: rows * columns * dtype.itemsize]
    return torch.from_numpy(values).view(dtype).view(rows, columns)


def _not_finite(table: TableSource, start: int, stored: torch.Tensor, found: torch.Tensor) -> UserError:
    """Where the first value is that is not finite; one in W1 or W2 makes all of a row or column of W so."""
    factors = [("W" if table.projection is None else "W1", start, stored), ("W1·W2", start, found)]
    if table.projection is not None:
        factors.insert(0, ("W2", 0, table.projection))
    name, first, factor = next(each for each in factors if not bool(each[2].isfinite().all()))
    row, column = (int(each) for each in (~factor.isfinite()).nonzero()[0])
    value = float(factor[row, column])
    return UserError(f"table {table.name!r}: {name} holds {value} in row {first + row:,}, column {column:,}")
