"""The write pass of one group: texts become ids, dense columns are standardised, and each split gets a part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.hashing import hash_texts
from mlet_dist.data.id_counts import IdCounts, SplitCounts
from mlet_dist.data.parquet_parts import ParquetOutput
from mlet_dist.data.prepare.chunks import (
    ChunkGroup,
    dense_column,
    label_column,
    sparse_column,
    values_and_indices,
    weight_column,
)
from mlet_dist.data.prepare.counting import Scale
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.sealed_files import put_in_place
from mlet_dist.data.prepare.splits import Splitter
from mlet_dist.data.prepare.typed_columns import FLOAT32_MAX
from mlet_dist.data.prepare.vocabulary import Lookup
from mlet_dist.data.schema import ROW_GROUP_ROWS, SAMPLE_WEIGHT, SPLITS, Part
from mlet_dist.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks as rows of the data set.

    Attributes:
        spec: description of the table.
        vocabularies: the directory of each table's vocabulary.
        scales: mean and deviation of each dense feature that is standardised.
    """

    spec: TableSpec
    vocabularies: Mapping[str, Path]
    scales: Mapping[str, Scale]

    def write(
        self, splitter: Splitter, group: ChunkGroup, directory: Path, names: Mapping[str, str], scratch: Path
    ) -> tuple[dict[str, Part], SplitCounts]:
        """Write a group's rows as one part per split.

        Args:
            splitter: the assignment of rows to splits.
            group: the chunks to write.
            directory: the data set's directory.
            names: the path of each split's part in ``directory``.
            scratch: directory for unfinished parts.

        Returns:
            The parts that have rows, by split, and the counts of their ids.
        """
        lookups = {name: Lookup.open(directory, name) for name, directory in self.vocabularies.items()}
        # A unique name, since a shard that is started twice must not write to the same file.
        temporary = scratch / f"{group.number:06}.{uuid4().hex}"
        writers = {
            split: _PartWriter(directory / name, temporary.with_suffix(f".{split}"), self.spec)
            for split, name in names.items()
        }
        for chunk, codes in group.read(splitter):
            table = self._encode(chunk, lookups)
            for code in np.unique(codes):
                of_split = codes == code
                rows = table if of_split.all() else table.filter(pa.array(of_split))
                writers[SPLITS[code]].write(rows)
        parts = {split: part for split, writer in writers.items() if (part := writer.close(names[split])) is not None}
        return parts, {split: writers[split].counts for split in parts}

    def _encode(self, chunk: pa.Table, lookups: Mapping[str, Lookup]) -> pa.Table:
        columns = {label.column_name: chunk[label_column(label.column_name)] for label in self.spec.labels}
        if self.spec.sample_weight is not None:
            columns[SAMPLE_WEIGHT] = chunk[SAMPLE_WEIGHT]
        for dense in self.spec.dense:
            column = chunk[dense_column(dense.name)]
            if dense.name in self.scales:
                scale = self.scales[dense.name]
                numbers = column.fill_null(scale.mean).to_numpy()
                scaled = (numbers - scale.mean) / scale.deviation
                if not (np.abs(scaled) <= FLOAT32_MAX).all():
                    raise UserError(
                        f"dense feature {dense.name}: {numbers[np.abs(scaled).argmax()]} is too many deviations "
                        f"({scale.deviation}) from the training split's mean {scale.mean}; choose another transform"
                    )
                column = pa.array(scaled.astype(np.float32))
            columns[dense.name] = column
        for sparse in self.spec.sparse:
            texts, indices, offsets = values_and_indices(chunk[sparse_column(sparse.name)])
            ids = pa.array(self._ids(sparse, texts, lookups)[indices])
            columns[sparse.name] = ids if offsets is None else pa.ListArray.from_arrays(offsets, ids)
            if sparse.weighted:
                columns[f"{sparse.name}.weight"] = chunk[weight_column(sparse.name)]
        return pa.table(columns)

    def _ids(self, sparse: SparseColumn, texts: pa.StringArray, lookups: Mapping[str, Lookup]) -> np.ndarray:
        if sparse.num_embeddings is None:
            return lookups[sparse.table_name].ids(texts)
        return (hash_texts(texts, sparse.table_name) % np.uint64(sparse.num_embeddings)).astype(np.int32)


class _PartWriter:
    """Writes rows in full row groups to a temporary Parquet file, and renames it to ``path`` if it has any rows."""

    def __init__(self, path: Path, temporary: Path, spec: TableSpec) -> None:
        self._path, self._temporary = path, temporary
        self._labels = [label.column_name for label in spec.labels]
        self._optional = [label.column_name for label in spec.labels if label.missing == "unknown"]
        self._label_counts = np.zeros((len(self._labels), 2), np.int64)  # rows with label 1, rows that have the label
        # The ids of a single-valued feature without a vocabulary are all known.
        self._counted = [each for each in spec.sparse if each.encoding == "vocabulary" or each.multi_valued]
        self.counts: dict[str, IdCounts] = {}
        self._file: ParquetOutput | None = None
        self._pending: list[pa.Table] = []
        self._pending_rows = self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._rows += table.num_rows
        for index, name in enumerate(self._labels):
            self._label_counts[index] += pc.sum(table[name]).as_py() or 0, table.num_rows - table[name].null_count
        for sparse in self._counted:
            counts = _count_ids(table[sparse.name], has_vocabulary=sparse.encoding == "vocabulary")
            self.counts[sparse.name] = self.counts[sparse.name] + counts if sparse.name in self.counts else counts
        self._pending.append(table)
        self._pending_rows += table.num_rows
        if self._pending_rows >= ROW_GROUP_ROWS:
            self._flush(self._pending_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS)

    def close(self, name: str) -> Part | None:
        """Complete the file; return its description with the path ``name``, or None if there are no rows."""
        if not self._rows:
            return None
        if self._pending:
            self._flush(self._pending_rows)
        assert self._file is not None
        sums = self._file.close()
        put_in_place(self._temporary, self._path)
        hashes = sums.sha256, sums.pages_sha256
        counts = tuple((int(ones), int(known)) for ones, known in self._label_counts)
        of_labels = counts if len(counts) > 1 else ()
        return Part(name, self._rows, counts[0][0], sums.bytes, *hashes, ROW_GROUP_ROWS, of_labels)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._pending)
        if self._file is None:
            self._file = ParquetOutput(self._temporary, table.schema, self._optional)
        self._file.write(table.slice(0, rows))
        rest = table.slice(rows)
        self._pending, self._pending_rows = ([rest] if rest.num_rows else []), rest.num_rows


def _count_ids(column: pa.ChunkedArray, *, has_vocabulary: bool) -> IdCounts:
    empty = 0
    if pa.types.is_list(column.type):
        empty = int(np.count_nonzero(pc.list_value_length(column).to_numpy() == 0))
        column = pc.list_flatten(column)
    unknown = len(column) - int(np.count_nonzero(column.to_numpy())) if has_vocabulary else None
    return IdCounts(len(column), unknown, empty)
