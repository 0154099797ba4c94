"""Chunks (files with the valid, typed rows of one block) and groups of consecutive chunks, the unit of later passes."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlet_dist.data.prepare.sealed_files import new_sealed, read_sealed
from mlet_dist.data.prepare.splits import FRACTIONS, MAX_FRACTION, MILLIONTHS, Codes, Splitter
from mlet_dist.errors import UserError

TIME = "time"  # name of a column
CHUNK_VERSION = 4  # changes when the chunk files change, so that those of other versions are not used
GROUP_ROWS = 1 << 18  # a group ends once it has this many rows

_WRITE_BYTES = 1 << 20
_METADATA = b"mlet"


@dataclass(frozen=True)
class Rejected:
    """A malformed line or row that was skipped: its number in the file (from 1 on), the reason, and how it starts."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class ChunkInfo:
    """Statistics of a parsed block.

    Line numbers are relative to the block, since the number of lines before it is not known yet.

    Attributes:
        rows: number of valid rows.
        count: number of lines without blank ones.
        passed: number of all lines.
        malformed: number of malformed lines, which were skipped.
        examples: the first malformed lines.
        times: the kinds of times among the valid rows, each with the number of its first line.
        other_labels: by label, how many rows hold a number other than 0 and 1, by its text.
        counts: for each multi-valued feature, what was left out or noticed (keys of ``list_columns``), as a number of
            values or rows.
    """

    rows: int
    count: int
    passed: int
    malformed: int
    examples: tuple[Rejected, ...]
    times: dict[str, int]
    other_labels: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def label_column(name: str) -> str:
    """Return the name of a label's column in a chunk, and of its entry in ``ChunkInfo.counts``."""
    return f"label.{name}"


def dense_column(name: str) -> str:
    """Return the name of a dense feature's column in a chunk."""
    return f"dense.{name}"


def sparse_column(name: str) -> str:
    """Return the name of a sparse feature's column in a chunk."""
    return f"sparse.{name}"


def weight_column(name: str) -> str:
    """Return the name of the column with a sparse feature's weights in a chunk."""
    return f"weight.{name}"


def save_chunk(path: Path, table: pa.Table, info: ChunkInfo) -> None:
    """Write a chunk, with ``info`` as metadata, as the sealed file ``path``."""
    table = pa.table({name: _narrow(table[name]) for name in table.column_names})
    schema = table.schema.with_metadata({_METADATA: json.dumps(asdict(info)).encode()})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    # Arrow writes thousands of small pieces, and each would be a call of Python.
    with (
        new_sealed(path) as sink,
        pa.BufferedOutputStream(pa.PythonFile(sink, "w"), _WRITE_BYTES) as buffered,
        pa.ipc.new_file(buffered, schema, options=options) as writer,
    ):
        # A single record batch, so that all rows share one dictionary per column.
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)


def _narrow(column: pa.ChunkedArray) -> pa.Array:
    """Return the column with the narrowest dictionary indices that suffice; other columns are unchanged."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type):
        return array
    size = len(array.dictionary)
    kind = pa.int8() if size <= 1 << 7 else pa.int16() if size <= 1 << 15 else pa.int32()
    return pa.DictionaryArray.from_arrays(array.indices.cast(kind), array.dictionary)


def load_info(path: Path) -> ChunkInfo | None:
    """Return the ``info`` of ``save_chunk``, or None if the chunk does not exist.

    Raises:
        DamagedPieceError: the chunk is damaged.
    """
    if not os.path.lexists(path):
        return None
    return _info_of(pa.ipc.open_file(read_sealed(path)).schema)


def _info_of(schema: pa.Schema) -> ChunkInfo:
    content = json.loads(schema.metadata[_METADATA])
    examples = tuple(Rejected(**each) for each in content.pop("examples"))
    return ChunkInfo(**content, examples=examples)


def load_chunk(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a chunk, with all columns or with ``columns`` alone.

    Raises:
        DamagedPieceError: the chunk is missing or damaged.
    """
    content = read_sealed(path)
    schema = pa.ipc.open_file(content).schema
    chosen = None if columns is None else [schema.get_field_index(name) for name in columns]
    return pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(included_fields=chosen)).read_all()


def load_times(path: Path, in_millionths: bool) -> npt.NDArray[np.int64]:
    """Return the time column of a chunk; ``in_millionths`` converts whole numbers, as other chunks hold fractions."""
    chunk = load_chunk(path, [TIME])
    times: npt.NDArray[np.int64] = chunk[TIME].to_numpy()
    info = _info_of(chunk.schema)
    if not in_millionths or FRACTIONS in info.times or not times.size:
        return times
    if max(-int(times.min()), int(times.max())) > MAX_FRACTION:
        raise UserError(
            f"the split's column of times holds numbers with a fraction and numbers beyond {MAX_FRACTION:,}; give all "
            "of them in one unit"
        )
    return times * MILLIONTHS


class ChunkTimes(Sequence[Any]):
    """The time columns of chunks, each loaded when it is accessed."""

    def __init__(self, chunks: Sequence[Path], in_millionths: bool) -> None:
        self._chunks, self._in_millionths = chunks, in_millionths

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        return load_times(self._chunks[index], self._in_millionths)


def values_and_indices(column: pa.ChunkedArray) -> tuple[pa.StringArray, npt.NDArray[np.int32], pa.Int32Array | None]:
    """Return a sparse column's distinct texts, the index of each value in row order, and the lists' offsets or None."""
    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_list(array.type):
        return array.dictionary, array.indices.to_numpy(), None
    offsets = array.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    flat = array.values.slice(first, last - first)
    return flat.dictionary, flat.indices.to_numpy(), pa.array(offsets.to_numpy() - first)


@dataclass(frozen=True)
class ChunkGroup:
    """Consecutive chunks of a raw file.

    Attributes:
        number: number of the group among those of all files, in row order.
        file: number of the raw file.
        chunks: the chunk files, in row order.
        start: number of the raw file's rows before the group.
        rows: number of rows of the group.
    """

    number: int
    file: int
    chunks: tuple[Path, ...]
    start: int
    rows: int

    def read(self, splitter: Splitter, columns: Sequence[str] | None = None) -> Iterator[tuple[pa.Table, Codes]]:
        """Yield the rows of each chunk, with all columns or with ``columns`` alone, and each row's split code."""
        start = self.start
        for path in self.chunks:
            table = load_chunk(path, columns)
            times: npt.NDArray[np.int64] | None = None
            if splitter.rule.by == "time":
                times = load_times(path, splitter.in_millionths)
            yield table, splitter.codes(self.file, start, table.num_rows, times)
            start += table.num_rows


def make_groups(files: Sequence[Sequence[tuple[Path, int]]]) -> list[ChunkGroup]:
    """Return the groups of all files; ``files`` holds each file's chunks with their numbers of rows."""
    groups: list[ChunkGroup] = []
    for number, chunks in enumerate(files):
        start, pending, rows = 0, [], 0
        for index, (path, count) in enumerate(chunks):
            pending.append(path)
            rows += count
            if rows >= GROUP_ROWS or index == len(chunks) - 1:
                groups.append(ChunkGroup(len(groups), number, tuple(pending), start, rows))
                start, pending, rows = start + rows, [], 0
    return groups
