"""Random access to a split's rows through Parquet row groups; every value is checked as it is decoded."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.schema import DatasetSchema, Part
from mlet_dist.errors import UserError


@dataclass(frozen=True)
class RowGroup:
    """Decoded columns: dense (rows, num_dense) float32, ids (T, rows) int32, labels (rows,) int8."""

    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int8]


class SplitRows:
    """Where the row groups of a split lie, and how one is decoded and checked.

    Raises:
        UserError: a part is missing, not Parquet, lacks a column or has another number of rows than the schema says.
    """

    def __init__(
        self, path: Path, schema: DatasetSchema, parts: Sequence[Part], dense: Sequence[str], sparse: Sequence[str]
    ) -> None:
        self.starts: list[int] = []  # first row of each row group, then the number of rows
        self._groups: list[tuple[Path, int]] = []
        self._label, self._dense, self._sparse = schema.label, dense, sparse
        self._num_embeddings = np.array([schema.num_embeddings[name] for name in sparse], dtype=np.int64)
        types = {self._label: pa.int8()} | dict.fromkeys(dense, pa.float32()) | dict.fromkeys(sparse, pa.int32())
        position = 0
        for part in parts:
            file = path / part.path
            try:
                footer = pq.read_metadata(file)
            except FileNotFoundError:
                raise UserError(f"{file}: missing, though {path}/schema.json names it") from None
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file}: not a whole Parquet file: {_first_line(error)}") from error
            if footer.num_rows != part.rows:
                raise UserError(f"{file}: has {footer.num_rows} rows, but schema.json says {part.rows}")
            found = footer.schema.to_arrow_schema()
            for name, expected in types.items():
                index = found.get_field_index(name)
                if index < 0 or found.field(index).type != expected:
                    actual = "missing" if index < 0 else str(found.field(index).type)
                    raise UserError(f"{file}: column {name} is {actual} instead of {expected}")
            for group in range(footer.num_row_groups):
                self.starts.append(position)
                self._groups.append((file, group))
                position += footer.row_group(group).num_rows
        self.starts.append(position)

    def decode(self, index: int) -> RowGroup:
        """Read a row group and check its values."""
        file, group = self._groups[index]
        columns = [self._label, *self._dense, *self._sparse]
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: row group {group} cannot be read: {_first_line(error)}") from error
        for name in columns:
            if table[name].null_count:
                raise UserError(f"{file}: column {name} has {table[name].null_count} missing values; none are allowed")
        labels = table[self._label].to_numpy()
        dense = np.empty((table.num_rows, len(self._dense)), dtype=np.float32)
        for i, name in enumerate(self._dense):
            dense[:, i] = table[name].to_numpy()
        ids = np.empty((len(self._sparse), table.num_rows), dtype=np.int32)
        for i, name in enumerate(self._sparse):
            ids[i] = table[name].to_numpy()
        self._check(file, labels, dense, ids)
        return RowGroup(dense, ids, labels)

    def _check(
        self, file: Path, labels: npt.NDArray[np.int8], dense: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]
    ) -> None:
        wrong_labels = labels[(labels < 0) | (labels > 1)]
        if wrong_labels.size:
            raise UserError(f"{file}: column {self._label} holds {wrong_labels[0]}; a label is 0 or 1")
        finite = np.isfinite(dense)
        if not finite.all():
            row, index = np.argwhere(~finite)[0]
            raise UserError(
                f"{file}: column {self._dense[index]} holds {dense[row, index]}; it must be a finite number"
            )
        for name, column, limit in zip(self._sparse, ids, self._num_embeddings, strict=True):
            if column.min() < 0 or column.max() >= limit:
                wrong = column[(column < 0) | (column >= limit)]
                raise UserError(
                    f"{file}: column {name} holds id {wrong[0]}, outside [0, {limit}): its table has "
                    f"num_embeddings {limit}"
                )


class RowReader:
    """Copies ascending ranges of rows; each row group that they touch is decoded once."""

    def __init__(self, parts: SplitRows) -> None:
        self._parts = parts
        self._index = -1
        self._group: RowGroup | None = None

    def read(
        self, start: int, dense: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], labels: npt.NDArray[np.float32]
    ) -> None:
        """Fill the arrays with the rows from ``start`` on."""
        done = 0
        while done < len(labels):
            index = bisect_right(self._parts.starts, start + done) - 1
            if self._group is None or index != self._index:
                self._index, self._group = index, self._parts.decode(index)
            first = start + done - self._parts.starts[index]
            taken = min(len(labels) - done, self._parts.starts[index + 1] - self._parts.starts[index] - first)
            dense[done : done + taken] = self._group.dense[first : first + taken]
            ids[:, done : done + taken] = self._group.ids[:, first : first + taken]
            labels[done : done + taken] = self._group.labels[first : first + taken]
            done += taken


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
