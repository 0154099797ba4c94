"""The count pass of one group: its training values' counts, in a run sorted by hash for merging into vocabularies."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlet_dist.data.hashing import hash_texts
from mlet_dist.data.prepare.chunks import ChunkGroup, dense_column, sparse_column, values_and_indices
from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.data.prepare.sealed_files import map_sealed, new_sealed
from mlet_dist.data.prepare.splits import Codes, Splitter
from mlet_dist.data.schema import SPLITS

_METADATA = b"mlet"
_TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations from the mean of a column's numbers."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        if not self.count or not other.count:  # return the other's mean without rounding errors
            return other if not self.count else self
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        return Moments(count, mean, self.squares + other.squares + gap * gap * self.count * other.count / count)

    @property
    def scale(self) -> "Scale":
        """Mean and standard deviation of the numbers; 1 if they are all the same, since numbers are divided by it."""
        deviation = float(np.sqrt(self.squares / self.count)) if self.count and self.squares > 0 else 1.0
        return Scale(self.mean, deviation)


@dataclass(frozen=True)
class Scale:
    """What standardises a column: ``mean`` is subtracted, and the difference divided by ``deviation``."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class GroupCounts:
    """Statistics of a group.

    Attributes:
        rows: number of rows of each split.
        values: number of values of each multi-valued feature in the training split.
        moments: moments of each dense feature that is standardised, in the training split.
    """

    rows: dict[str, int]
    values: dict[str, int]
    moments: dict[str, Moments]


def count_group(spec: TableSpec, splitter: Splitter, group: ChunkGroup, run: Path) -> GroupCounts:
    """Count a group; the counts of each value in its training rows go to the file ``run``."""
    rows = np.zeros(len(SPLITS), np.int64)
    values = {sparse.name: 0 for sparse in spec.sparse if sparse.multi_valued}
    moments = {dense.name: Moments() for dense in spec.dense if dense.transform == "standardise"}
    counted: dict[str, list[pa.Table]] = {s.table_name: [] for s in spec.sparse if s.encoding == "vocabulary"}
    columns = [*(dense_column(name) for name in moments), *(sparse_column(sparse.name) for sparse in spec.sparse)]
    for table, codes in group.read(splitter, columns):
        rows += np.bincount(codes, minlength=len(SPLITS))
        train = codes == _TRAIN
        for name in moments:
            moments[name] += _moments(table[dense_column(name)], train)
        for sparse in spec.sparse:
            texts, indices, offsets = values_and_indices(table[sparse_column(sparse.name)])
            chosen = indices if train.all() else indices[_per_value(train, offsets)]
            if sparse.name in values:
                values[sparse.name] += len(chosen)
            if sparse.encoding == "vocabulary" and len(chosen):
                counts = np.bincount(chosen, minlength=len(texts))
                seen = np.flatnonzero(counts)
                of_values = pa.table({"value": texts.take(pa.array(seen)), "count": counts[seen]})
                counted[sparse.table_name].append(of_values)
    _save_run(run, counted)
    return GroupCounts(dict(zip(SPLITS, rows.tolist(), strict=True)), values, moments)


def moments_of(groups: list[GroupCounts], name: str) -> Moments:
    """Return the moments of a dense feature over all groups, merged in the given order."""
    total = Moments()
    for group in groups:
        total += group.moments[name]
    return total


class SortedRun:
    """A group's counts, memory-mapped: for each feature, values and counts, sorted by the value's hash.

    Opening does not verify the seal, since a run is opened once for each feature: call ``check_sealed`` before.
    """

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(map_sealed(path))
        self._bounds: dict[str, list[int]] = json.loads(reader.schema.metadata[_METADATA])
        self._table = reader.read_all()

    def size(self, feature: str) -> int:
        """Return the number of distinct values of the feature."""
        start, stop = self._bounds[feature]
        return stop - start

    def part(self, feature: str, low: int, high: int) -> pa.Table:
        """Return the columns value and count of the feature's values with a hash in ``[low, high)``."""
        start, stop = self._bounds[feature]
        rows = self._table.slice(start, stop - start)
        if not rows.num_rows:
            return rows.select(["value", "count"])
        hashes = rows["hash"].chunk(0).to_numpy()
        first = int(np.searchsorted(hashes, np.uint64(low)))
        last = len(hashes) if high >= 2**64 else int(np.searchsorted(hashes, np.uint64(high)))
        return rows.select(["value", "count"]).slice(first, last - first)


def sum_counts(tables: list[pa.Table]) -> pa.Table:
    """Return one row per value with the sum of its counts, in no particular order."""
    summed = pa.concat_tables(tables).group_by("value", use_threads=False).aggregate([("count", "sum")])
    return summed.rename_columns({"count_sum": "count"}).select(["value", "count"])


def _save_run(path: Path, counted: dict[str, list[pa.Table]]) -> None:
    """Write the sorted run: the rows of one feature after another, with each feature's range of rows as metadata."""
    kind = pa.schema([("hash", pa.uint64()), ("value", pa.string()), ("count", pa.int64())])
    bounds: dict[str, tuple[int, int]] = {}
    tables, position = [kind.empty_table()], 0
    for name, of_chunks in counted.items():
        if of_chunks:
            summed = sum_counts(of_chunks).combine_chunks()
            hashes = hash_texts(_single_chunk(summed["value"]), name)
            order = pa.array(np.argsort(hashes, kind="stable"))
            tables.append(pa.table([pa.array(hashes), *summed.columns], schema=kind).take(order))
        size = tables[-1].num_rows if of_chunks else 0
        bounds[name] = (position, position + size)
        position += size
    schema = kind.with_metadata({_METADATA: json.dumps(bounds).encode()})
    with new_sealed(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in pa.concat_tables(tables).combine_chunks().to_batches():
            writer.write_batch(batch)


def _single_chunk(column: pa.ChunkedArray) -> pa.StringArray:
    return column.chunk(0) if column.num_chunks else pa.array([], pa.string())


def _per_value(train: npt.NDArray[np.bool_], offsets: pa.Int32Array | None) -> npt.NDArray[np.bool_]:
    return train if offsets is None else np.repeat(train, np.diff(offsets.to_numpy()))


def _moments(column: pa.ChunkedArray, train: Codes | npt.NDArray[np.bool_]) -> Moments:
    numbers = column.filter(pa.array(train)).drop_null().to_numpy()
    if not numbers.size:
        return Moments()
    # The mean of equal numbers is rounded, which would give them a tiny deviation instead of 0.
    mean = float(numbers[0] if numbers.min() == numbers.max() else numbers.mean())
    return Moments(numbers.size, mean, float(np.square(numbers - mean).sum()))
