"""Vocabularies: the mapping from a feature's values to ids, merged from the sorted runs of all groups.

A vocabulary is saved twice: as Parquet, for people, and as a table sorted by hash, for lookups. Runs are merged in
ranges of hashes, so that memory holds only one range of all values, and the values that are kept.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.hashing import hash_texts
from mlet_dist.data.parquet_parts import write_parquet
from mlet_dist.data.prepare.counting import SortedRun, sum_counts
from mlet_dist.data.prepare.raw_formats import SparseColumn
from mlet_dist.data.prepare.sealed_files import map_sealed, new_sealed, save_record, seal_of, temporary_for
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS
from mlet_dist.errors import UserError

MAX_BYTES = 2**31 - 1  # of the texts in one Arrow array

_BATCH = 1 << 18  # values to hash at a time


def make_vocabulary(directory: Path, sparse: SparseColumn, runs: list[Path], range_values: int) -> None:
    """Merge the runs, which were verified, into the vocabulary's files in ``directory``; their record is the last."""
    limit = None if sparse.max_num_embeddings is None else sparse.max_num_embeddings - 1  # id 0 is a row, too
    table = merge_runs(sparse.table_name, runs, sparse.min_count, range_values, limit)
    record_vocabulary(directory, sparse.table_name, table)


def record_vocabulary(directory: Path, feature: str, table: pa.Table) -> None:
    """Write a vocabulary's files, of the columns value and count in the order of ids, and then their record.

    Raises:
        UserError: there are more values than a vocabulary can have.
    """
    size = pc.sum(pc.binary_length(table["value"])).as_py() or 0
    if table.num_rows >= MAX_NUM_EMBEDDINGS or size > MAX_BYTES:
        raise UserError(
            f"feature {feature}: {table.num_rows} values of {size} bytes exceed the limits of a vocabulary "
            f"({MAX_NUM_EMBEDDINGS - 1} values of {MAX_BYTES} bytes); raise its min_count, set "
            "max_num_embeddings or use `encoding: hash`"
        )
    directory.mkdir(parents=True, exist_ok=True)
    table = table.combine_chunks()
    seal = save_vocabulary(directory, feature, table)
    fingerprint = values_fingerprint(feature, table["value"]).hex()
    record = {"values": table.num_rows, "fingerprint": fingerprint, "seal": seal}
    save_record(directory / f"{feature}.json", record)


def merge_runs(
    feature: str, runs: Sequence[Path], min_count: int, range_values: int, max_values: int | None = None
) -> pa.Table:
    """Return the columns value and count of the values with at least ``min_count`` occurrences; row i has id i + 1.

    Rows are sorted by descending count, ties by value, and at most ``max_values`` are returned.
    """
    kept = [
        summed.filter(pc.greater_equal(summed["count"], min_count))
        for summed in merged_counts(feature, runs, range_values)
    ]
    return most_frequent(kept, max_values)


def merged_counts(feature: str, runs: Sequence[Path], range_values: int) -> Iterator[pa.Table]:
    """Yield the columns value and count of all values of the runs, about ``range_values`` counts at a time."""
    values = sum(SortedRun(path).size(feature) for path in runs)
    ranges = 1 + values // range_values
    bounds = [2**64 * index // ranges for index in range(ranges + 1)]
    for low, high in pairwise(bounds):
        yield sum_counts([SortedRun(path).part(feature, low, high) for path in runs])


def most_frequent(tables: Sequence[pa.Table], max_values: int | None) -> pa.Table:
    """Return the values of all tables by descending count, ties by value; at most ``max_values``."""
    table = pa.concat_tables(tables)
    return table.sort_by([("count", "descending"), ("value", "ascending")]).slice(0, max_values)


def save_vocabulary(directory: Path, feature: str, table: pa.Table) -> str:
    """Write ``<feature>.parquet``, whose seal is returned, and then the sealed file ``<feature>.lookup``."""
    path = directory / f"{feature}.parquet"
    with temporary_for(path) as temporary:
        write_parquet(table, temporary)
        seal = seal_of(temporary, final=path)
    lookup = index_of(feature, table["value"].chunk(0) if table.num_rows else pa.array([], pa.string()))
    with new_sealed(lookup_path(directory, feature)) as sink, pa.ipc.new_file(sink, lookup.schema) as writer:
        for batch in lookup.combine_chunks().to_batches():
            writer.write_batch(batch)
    return seal


def index_of(feature: str, values: pa.StringArray) -> pa.Table:
    """Return what ``Lookup`` needs of a vocabulary: hash, id and value, by hash; ``values`` are in the order of ids."""
    hashes = hash_texts(values, feature)
    order = np.argsort(hashes, kind="stable")
    return pa.table({"hash": hashes[order], "id": (order + 1).astype(np.int32), "value": values.take(pa.array(order))})


def lookup_path(directory: Path, feature: str) -> Path:
    """Return the path of the table from which ``Lookup`` takes ids."""
    return directory / f"{feature}.lookup"


class Lookup:
    """The ids of a feature's texts, from the ``index_of`` its vocabulary."""

    def __init__(self, feature: str, index: pa.Table) -> None:
        self._feature = feature
        self.num_embeddings = 1 + index.num_rows
        if index.num_rows:
            self._hashes = index["hash"].chunk(0).to_numpy()
            self._ids = index["id"].chunk(0).to_numpy()
            self._values = index["value"].chunk(0)

    @classmethod
    def open(cls, directory: Path, feature: str) -> "Lookup":
        """Open a vocabulary on disk, memory-mapped and so shared by processes.

        This does not verify the seal, since every group opens all vocabularies: call ``check_sealed`` before.
        """
        return cls(feature, pa.ipc.open_file(map_sealed(lookup_path(directory, feature))).read_all())

    def ids(self, texts: pa.StringArray) -> npt.NDArray[np.int32]:
        """Return the id of each text, 0 if the vocabulary does not contain it: (len(texts),) int32."""
        ids = np.zeros(len(texts), np.int32)
        if self.num_embeddings == 1 or not len(texts):
            return ids
        hashes = hash_texts(texts, self._feature)
        positions = np.searchsorted(self._hashes, hashes)
        rows = np.arange(len(texts))
        # Several values may share a hash: advance while the hash is equal and the value is not.
        while rows.size:
            inside = positions < len(self._hashes)
            rows, positions = rows[inside], positions[inside]
            same_hash = self._hashes[positions] == hashes[rows]
            rows, positions = rows[same_hash], positions[same_hash]
            same = pc.equal(self._values.take(pa.array(positions)), texts.take(pa.array(rows)))
            found = same.to_numpy(zero_copy_only=False)
            ids[rows[found]] = self._ids[positions[found]]
            rows, positions = rows[~found], positions[~found] + 1
        return ids


def values_fingerprint(feature: str, values: pa.ChunkedArray) -> bytes:
    """Return the SHA-256 of a vocabulary's values in the order of their ids."""
    digest = hashlib.sha256(f"{feature} {len(values)}\n".encode())
    for start in range(0, len(values), _BATCH):
        # Lengths and bytes, so that different lists of values cannot have the same digest.
        texts = pa.concat_arrays(values.slice(start, _BATCH).chunks)
        digest.update(pc.binary_length(texts).to_numpy().astype("<i8").tobytes())
        offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset :]
        digest.update(memoryview(texts.buffers()[2] or b"")[offsets[0] : offsets[len(texts)]])
    return digest.digest()
