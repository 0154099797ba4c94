"""Raw Criteo logs become a data set: split in time order, categorical values become ids, Parquet parts.

The raw text is read once, into a staging file, since the number of rows decides where the splits are. Memory is
bounded by one part's rows and the vocabulary, not by the number of rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.criteo import DENSE, LABEL, SPARSE, CriteoReader
from mlet_dist.data.parts import PART_ROWS, PartWriter, split_bounds, write_parquet
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress
from mlet_dist.staging import staged_directory

MERGE_ROWS = 1 << 18
MAX_MIN_COUNT = 2**63 - 1  # counts are int64


def prepare_criteo(raw: Sequence[Path], out: Path, *, min_count: int = 1) -> DatasetSchema:
    """Make the data set ``out`` from raw Criteo files, taken in the order given.

    The first 80% of the rows are the training split, the next 10% valid, the last 10% test. Ids are given by
    descending count in the training split, ties by value; a value seen there fewer than ``min_count`` times, or only
    in the other splits, is out of vocabulary (id 0).

    Raises:
        UserError: ``min_count`` is out of range, ``out`` is taken, a raw file is unusable (see ``CriteoReader``), or
            too few rows remain.
    """
    if not 1 <= min_count <= MAX_MIN_COUNT:
        raise UserError(f"min_count is {min_count}; it must be at least 1 and at most {MAX_MIN_COUNT}")
    if not raw:
        raise UserError("no raw file was given; name at least one Criteo log")
    with staged_directory(out) as directory:
        staging = directory / "staging.arrow"
        rows, malformed = _stage(raw, staging)
        writer = PartWriter(directory, rows, LABEL)
        vocabularies = _build_vocabularies(staging, split_bounds(rows)["train"][1], min_count)
        (directory / "vocabulary").mkdir()
        for name, vocabulary in vocabularies.items():
            write_parquet(vocabulary, directory / "vocabulary" / f"{name}.parquet")
        with Progress("encode", rows, "rows") as progress:
            for table in _read_staged(staging, [LABEL, *DENSE, *SPARSE]):
                writer.write(_encode(table, vocabularies))
                progress.update(table.num_rows)
        staging.unlink()
        schema = DatasetSchema(
            source="criteo",
            label=LABEL,
            dense=DENSE,
            sparse=tuple(SparseFeature(name, 1 + vocabularies[name].num_rows) for name in SPARSE),
            malformed=malformed,
            parts={split: tuple(parts) for split, parts in writer.parts.items()},
            vocabulary_id=_fingerprint(vocabularies),
        )
        schema.save(directory)
    return schema


def _stage(raw: Sequence[Path], staging: Path) -> tuple[int, int]:
    """Write the typed rows of the raw files to an Arrow file; returns the numbers of valid and malformed lines."""
    readers = [CriteoReader(path) for path in raw]  # all of them first: a missing last file should not cost an hour
    sink: pa.ipc.RecordBatchFileWriter | None = None
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with Progress("read", sum(reader.size for reader in readers), "bytes") as progress:
        for reader in readers:
            for table in reader.read(progress):
                sink = sink or pa.ipc.new_file(staging, table.schema, options=options)
                sink.write_table(table)
    if sink is not None:
        sink.close()
    malformed = sum(reader.malformed for reader in readers)
    return sum(reader.lines for reader in readers) - malformed, malformed


def _read_staged(staging: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the staged rows in tables of about ``PART_ROWS`` rows; the other columns are not decompressed."""
    with pa.OSFile(str(staging)) as source:
        schema = pa.ipc.open_file(source).schema
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])
        reader = pa.ipc.open_file(source, options=options)
        batches: list[pa.RecordBatch] = []
        for index in range(reader.num_record_batches):
            batches.append(reader.get_batch(index))
            if sum(batch.num_rows for batch in batches) >= PART_ROWS:
                yield pa.Table.from_batches(batches)
                batches = []
        if batches:
            yield pa.Table.from_batches(batches)


class _ValueCounter:
    """Counts values over many tables; merges only once enough pend, so that the work grows with the rows counted."""

    def __init__(self) -> None:
        self._merged = pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
        self._pending: list[pa.Table] = []

    def add(self, values: pa.ChunkedArray) -> None:
        counts = pc.value_counts(values)
        self._pending.append(pa.table({"value": counts.field("values"), "count": counts.field("counts")}))
        if sum(table.num_rows for table in self._pending) > max(MERGE_ROWS, self._merged.num_rows):
            self._merge()

    def vocabulary(self, min_count: int) -> pa.Table:
        """Columns value and count, by descending count, ties by value."""
        self._merge()
        kept = self._merged.filter(pc.greater_equal(self._merged["count"], min_count))
        return kept.sort_by([("count", "descending"), ("value", "ascending")]).combine_chunks()

    def _merge(self) -> None:
        table = pa.concat_tables([self._merged, *self._pending])
        grouped = table.group_by("value").aggregate([("count", "sum")])
        self._merged = grouped.select(["value", "count_sum"]).rename_columns(["value", "count"])
        self._pending = []


def _build_vocabularies(staging: Path, train_rows: int, min_count: int) -> dict[str, pa.Table]:
    """Count the values of the first ``train_rows`` rows; row i of a vocabulary is id i + 1."""
    counters = {name: _ValueCounter() for name in SPARSE}
    left = train_rows
    with Progress("count", train_rows, "rows") as progress:
        for table in _read_staged(staging, SPARSE):
            table = table.slice(0, left)
            for name, counter in counters.items():
                counter.add(table[name])
            left -= table.num_rows
            progress.update(table.num_rows)
            if not left:
                break
    return {name: counter.vocabulary(min_count) for name, counter in counters.items()}


def _fingerprint(vocabularies: dict[str, pa.Table]) -> str:
    digest = hashlib.sha256()
    for name, vocabulary in vocabularies.items():
        digest.update(f"{name} {vocabulary.num_rows}\n".encode())
        for batch in vocabulary.to_batches(max_chunksize=MERGE_ROWS):
            # A value holds no line end: it was a field of a line.
            digest.update("".join(f"{value}\n" for value in batch["value"].to_pylist()).encode())
    return digest.hexdigest()


def _encode(table: pa.Table, vocabularies: dict[str, pa.Table]) -> pa.Table:
    columns = {name: table[name] for name in (LABEL, *DENSE)}
    for name, vocabulary in vocabularies.items():
        index = pc.index_in(table[name], value_set=vocabulary["value"])  # null where the value is not in it
        columns[name] = pc.fill_null(pc.add(index, pa.scalar(1, pa.int32())), 0)
    return pa.table(columns)
