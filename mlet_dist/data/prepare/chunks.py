"""Chunks, the valid rows of a block as a typed file, and groups, the consecutive chunks that later passes work on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlet_dist.data.prepare.splits import Codes, Splitter

LABEL, TIME = "label", "time"
CHUNK_VERSION = 2  # of the files: one that another version of this module has left is not taken for its own

_METADATA = b"mlet"


@dataclass(frozen=True)
class Rejected:
    """A line or row that was skipped: where it is in its file (from 1 on), why, and how it begins."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class ChunkInfo:
    """What is known of a block once it is parsed.

    Attributes:
        rows: valid ones.
        count: lines in all, blank ones not counted.
        passed: lines in all.
        malformed: how many were skipped.
        examples: the first of them; lines are counted from the block's beginning, as the file's is not known yet.
        times: the kinds of the valid rows' times, each with the first line that has it, counted likewise.
    """

    rows: int
    count: int
    passed: int
    malformed: int
    examples: tuple[Rejected, ...]
    times: dict[str, int]


def dense_column(name: str) -> str:
    """Name of a dense feature's column in a chunk."""
    return f"dense.{name}"


def sparse_column(name: str) -> str:
    """Name of a sparse feature's column in a chunk."""
    return f"sparse.{name}"


def weight_column(name: str) -> str:
    """Name of the column of a sparse feature's weights in a chunk."""
    return f"weight.{name}"


def save_chunk(path: Path, table: pa.Table, info: ChunkInfo) -> None:
    """Write a chunk; its file is there when it is whole."""
    table = pa.table({name: _narrow(table[name]) for name in table.column_names})
    schema = table.schema.with_metadata({_METADATA: json.dumps(asdict(info)).encode()})
    temporary = path.with_suffix(f".{uuid4().hex}.tmp")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        # One batch: all rows share one dictionary a column.
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    temporary.rename(path)


def _narrow(column: pa.ChunkedArray) -> pa.Array:
    """A dictionary with the smallest indices that do; any other column as it is."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type):
        return array
    size = len(array.dictionary)
    kind = pa.int8() if size <= 1 << 7 else pa.int16() if size <= 1 << 15 else pa.int32()
    return pa.DictionaryArray.from_arrays(array.indices.cast(kind), array.dictionary)


def load_info(path: Path) -> ChunkInfo | None:
    """What ``save_chunk`` was told; None where there is no chunk."""
    if not path.exists():
        return None
    with pa.OSFile(str(path)) as source:
        content = json.loads(pa.ipc.open_file(source).schema.metadata[_METADATA])
    examples = tuple(Rejected(**each) for each in content.pop("examples"))
    return ChunkInfo(**content, examples=examples)


def load_chunk(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a chunk; of the columns asked for alone, where they are."""
    with pa.OSFile(str(path)) as source:
        schema = pa.ipc.open_file(source).schema
        chosen = None if columns is None else [schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=chosen)).read_all()


def load_times(path: Path) -> npt.NDArray[np.int64]:
    """The chunk's time column."""
    return load_chunk(path, [TIME])[TIME].to_numpy()


def values_and_indices(column: pa.ChunkedArray) -> tuple[pa.StringArray, npt.NDArray[np.int32], pa.Int32Array | None]:
    """A sparse column's distinct texts, the index of each value in row order, and the offsets of its lists, if any."""
    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_list(array.type):
        return array.dictionary, array.indices.to_numpy(), None
    offsets = array.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    flat = array.values.slice(first, last - first)
    return flat.dictionary, flat.indices.to_numpy(), pa.array(offsets.to_numpy() - first)


GROUP_ROWS = 1 << 18


@dataclass(frozen=True)
class Group:
    """Chunks of a file.

    Attributes:
        number: among all groups of all files, in row order.
        file: number of the file.
        chunks: their files, in row order.
        start: the file's rows before them.
        rows: how many rows they hold.
    """

    number: int
    file: int
    chunks: tuple[Path, ...]
    start: int
    rows: int

    def read(self, splitter: Splitter, columns: Sequence[str] | None = None) -> Iterator[tuple[pa.Table, Codes]]:
        """Yield each chunk's rows, or these columns of them, and the splits that the rows belong to."""
        start = self.start
        for path in self.chunks:
            table = load_chunk(path, columns)
            times: npt.NDArray[np.int64] | None = None
            if splitter.rule.by == "time":
                times = table[TIME].to_numpy() if TIME in table.column_names else load_times(path)
            yield table, splitter.codes(self.file, start, table.num_rows, times)
            start += table.num_rows


def make_groups(files: Sequence[Sequence[tuple[Path, int]]]) -> list[Group]:
    """The groups of files whose chunks, with the rows of each, are given."""
    groups: list[Group] = []
    for number, chunks in enumerate(files):
        start, pending, rows = 0, [], 0
        for index, (path, count) in enumerate(chunks):
            pending.append(path)
            rows += count
            if rows >= GROUP_ROWS or index == len(chunks) - 1:
                groups.append(Group(len(groups), number, tuple(pending), start, rows))
                start, pending, rows = start + rows, [], 0
    return groups
