"""Work units of an export: ranges of rows of a table, each computed from W1 and W2 and encoded in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlet_dist.checkpoint.manifest import BLOCK_BYTES
from mlet_dist.checkpoint.tensor_ranges import DcpFiles
from mlet_dist.embeddings.collapse import block_rows, collapse_rows
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.encoding import RowOverflow
from mlet_dist.export.outputs import Output
from mlet_dist.stored_tables.table_source import TableSource

UNIT_BYTES = 1 << 26
"""Approximate bytes of W in float32 per unit: what one file contains, and what is repeated after a kill."""

_READ_BYTES = 1 << 22  # of W1 at a time, so that they are still in a cache when they are multiplied


@dataclass(frozen=True)
class Unit:
    """Rows ``[start, stop)`` of a table, number ``index`` of its ``count`` units; ``group`` names its outputs."""

    table: str
    index: int
    count: int
    start: int
    stop: int
    group: str = ""

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Name of the unit's files without their suffix."""
        return f"{self.table}-{self.index:05}-of-{self.count:05}"

    @property
    def record(self) -> str:
        """Name of the unit's record."""
        return record_name(self.group, self.name)


def record_name(group: str, name: str) -> str:
    """Return the name of the record of a unit or a table, which differs between groups of outputs."""
    return f"{name}.{group}" if group else name


def units_of(tables: Iterable[TableSource]) -> list[Unit]:
    """Return all units of the tables. They depend on the tables alone, so any number of ranks writes the same files."""
    units = []
    for table in tables:
        step = unit_rows(table)
        count = -(-table.num_embeddings // step)
        for index in range(count):
            start = index * step
            units.append(Unit(table.name, index, count, start, min(start + step, table.num_embeddings)))
    return units


def unit_rows(table: TableSource) -> int:
    """Return the rows per unit, a multiple of ``block_rows``, the rows per matrix product."""
    block = block_rows(table.hidden_dim or 1, table.embedding_dim)
    return max(1, UNIT_BYTES // (4 * table.embedding_dim * block)) * block


class UnitWorker:
    """Runs units one after the other in preallocated memory. Each thread has a worker of its own.

    Args:
        files: of the model; the worker opens them again for itself.
        tables: the tables of each group of outputs, by group and name.
        outputs: the outputs to write, by group.
        work: where the files are written.
        directories: output name -> directory within ``work``.
        device: for the matrix products.
    """

    def __init__(
        self,
        files: DcpFiles,
        tables: Mapping[tuple[str, str], TableSource],
        outputs: Mapping[str, Sequence[Output]],
        work: WorkDirectory,
        directories: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._files = files.streaming()
        self._tables = {key: table.with_files(self._files) for key, table in tables.items()}
        self._outputs, self._work, self._directories, self._device = outputs, work, directories, device
        sizes = [_buffer_sizes(table) for table in tables.values()]
        self._stored = torch.empty(max(stored for stored, _ in sizes), dtype=torch.uint8)
        self._table = torch.empty(max(table for _, table in sizes), dtype=torch.uint8)

    def run(self, unit: Unit) -> None:
        """Collapse, encode and write the rows of a unit, and record that it is finished.

        Raises:
            UserError: a file is damaged or missing, a value is not finite, or a file cannot be written.
        """
        table = self._tables[unit.group, unit.table]
        rows = self.collapse(unit)
        shards: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for output in self._outputs[unit.group]:
            file = f"{unit.name}{output.format.suffix}"
            path = f"{self._directories[output.name]}/{file}"
            try:
                encoded = output.encoding.encode(rows)
            except RowOverflow as error:
                raise UserError(f"table {unit.table!r}, row {unit.start + error.row:,}: {error.reason}") from None
            tensors = {f"{table.state_name}{suffix}": tensor for suffix, tensor in encoded.items()}
            with self._work.new_file(path) as stream:
                written = output.format.write(stream, file, unit.start, tensors)
            shards[output.name] = [shard.to_dict() for shard in written]
            files[path] = stream.checksum.entry()
        self._work.record(unit.record, {"files": files, "pieces": shards})

    def collapse(self, unit: Unit) -> torch.Tensor:
        """Return the unit's rows of W, float32, in memory that the next call overwrites."""
        table = self._tables[unit.group, unit.table]
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
                self._files.verify_streamed()  # damage to a file is the better message
                raise _not_finite(table, start, stored, part)
        self._files.verify_streamed()
        return found

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def worker_bytes(tables: Iterable[TableSource], outputs: Iterable[Output]) -> int:
    """Return the most memory that a worker takes: W1 as it is read, a block of two files each, W, and W encoded."""
    sizes = [_buffer_sizes(table) for table in tables]
    stored, table = (max(each) for each in zip(*sizes, strict=True))
    encoded = 2 * table if any(output.encoding.is_quantised for output in outputs) else 0
    return stored + 2 * BLOCK_BYTES + table + encoded


def _buffer_sizes(table: TableSource) -> tuple[int, int]:
    """Return the bytes of a worker's buffers for W1 and for W of a table."""
    stored = min(read_rows(table), table.num_embeddings) * table.row_bytes
    return stored, min(unit_rows(table), table.num_embeddings) * 4 * table.embedding_dim


def read_rows(table: TableSource) -> int:
    """Return the rows of W1 to read at a time, a multiple of ``block_rows``, the rows per matrix product."""
    block = block_rows(table.hidden_dim or 1, table.embedding_dim)
    return min(unit_rows(table), max(1, _READ_BYTES // (table.row_bytes * block)) * block)


def _view(buffer: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Return the beginning of a buffer as a matrix with a storage of the same size, all of which torch.save writes."""
    values = buffer.numpy()[: rows * columns * dtype.itemsize]
    return torch.from_numpy(values).view(dtype).view(rows, columns)


def _not_finite(table: TableSource, start: int, stored: torch.Tensor, found: torch.Tensor) -> UserError:
    """Return the error that names the first value that is not finite.

    W1 and W2 are searched before W: a value of theirs that is not finite makes a full row or column of W so.
    """
    factors = [("W" if table.projection is None else "W1", start, stored), ("W1·W2", start, found)]
    if table.projection is not None:
        factors.insert(0, ("W2", 0, table.projection))
    name, first, factor = next(each for each in factors if not bool(each[2].isfinite().all()))
    row, column = (int(each) for each in (~factor.isfinite()).nonzero()[0])
    value = float(factor[row, column])
    return UserError(f"table {table.name!r}: {name} holds {value} in row {first + row:,}, column {column:,}")
