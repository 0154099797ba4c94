"""Access to a split's rows through Parquet row groups; every value is checked as it is decoded."""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.loading.order import Order, Window
from mlet_dist.data.loading.prefetch import map_ahead
from mlet_dist.data.loading.rows import MultiValued, Rows, SingleValued
from mlet_dist.data.location import DataPath, RemotePath
from mlet_dist.data.parquet_parts import PAGES_KEY
from mlet_dist.data.schema import SAMPLE_WEIGHT, DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError

_FOOTER_THREADS = 8
_FOOTERS_KEPT = 32  # the footer of a part of 2^20 rows takes 1 ms to parse and about 2 MB


class SplitRows:
    """The row groups of a split, read, decoded and checked one at a time.

    Args:
        path: directory or URL of the data set.
        schema: the data set's schema.
        parts: the split's parts.
        dense, sparse: the features to read, in order.
        checked: positions of the parts whose files are compared with the schema at once; None for all. The others are
            compared when they are first read.
        known_ids: of some sparse features, the number of ids that are known; others of their table become id 0.
        by_row: lay single-valued ids out by row, which makes picking rows seven times as fast; False lays them out by
            column, the layout of Parquet and of a KeyedJaggedTensor.

    Attributes:
        group_rows: (G,) int64, number of rows of each row group, in file order.
        weighted: whether any feature has weights.

    Raises:
        UserError: a part that is compared at once is missing, is not Parquet, lacks a column, or is not the file that
            the schema describes.
    """

    def __init__(
        self,
        path: DataPath,
        schema: DatasetSchema,
        parts: Sequence[Part],
        dense: Sequence[str],
        sparse: Sequence[str],
        *,
        by_row: bool,
        checked: range | None = None,
        known_ids: Mapping[str, int] | None = None,
    ) -> None:
        features = {feature.name: feature for feature in schema.sparse}
        self._known_ids = known_ids or {}
        self._schema = schema
        self._path, self._labels, self._dense, self._by_row = path, schema.labels, dense, by_row
        self._sparse = [features[name] for name in sparse]
        self.weighted = any(feature.weighted for feature in self._sparse)
        self._types = dict.fromkeys(self._labels, pa.int8()) | dict.fromkeys(dense, pa.float32())
        if schema.sample_weight:
            self._types[SAMPLE_WEIGHT] = pa.float32()
        for feature in self._sparse:
            self._types[feature.name] = pa.list_(pa.int32()) if feature.multi_valued else pa.int32()
            if feature.weighted:
                self._types[_weight(feature)] = pa.list_(pa.float32())
        self._footer = lru_cache(_FOOTERS_KEPT)(self._checked_footer)
        # By part, not read from the files: a job of many ranks would open each file once for every rank.
        self._parts = [(path / part.path, part) for part in parts]
        self._groups = [(part, group) for part, each in enumerate(parts) for group in range(len(each.group_rows))]
        self.group_rows: npt.NDArray[np.int64] = np.array(
            [rows for part in parts for rows in part.group_rows], dtype=np.int64
        )
        checks = range(len(parts)) if checked is None else checked
        for _ in map_ahead(self._footer, checks, threads=_FOOTER_THREADS, ahead=64):
            pass

    def empty(self) -> Rows:
        """Return zero rows with all columns."""
        return self._converted(self._path, pa.schema(self._types.items()).empty_table())

    def decode(self, index: int) -> Rows:
        """Return the rows of row group ``index``; every value is checked.

        Raises:
            UserError: the row group cannot be read, or a value is missing or out of range.
        """
        return self.convert(index, self.read(index))

    def read(self, index: int) -> pa.Table:
        """Return the columns of row group ``index`` as they are in its file.

        Raises:
            UserError: the row group cannot be read, or its file is not the one that the schema describes.
        """
        part, group = self._groups[index]
        file, _ = self._parts[part]
        footer = self._footer(part)
        with (
            _user_errors(file, f"row group {group} cannot be read"),
            _opened(file, block_bytes=_compressed_bytes(footer.row_group(group))) as source,
            pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as parquet,
        ):
            return parquet.read_row_group(group, columns=list(self._types), use_threads=False)

    def convert(self, index: int, table: pa.Table) -> Rows:
        """Check the table that ``read`` returned for row group ``index``, and lay it out as ``Rows``.

        Raises:
            UserError: a value is missing or out of range.
        """
        part, _ = self._groups[index]
        return self._converted(self._parts[part][0], table)

    def _read_footer(self, file: DataPath) -> tuple[pq.FileMetaData, pa.Schema, int]:
        """Return the footer, the columns and the size of a file."""
        with _opened(file, block_bytes=0) as source:
            size = source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)
            with pq.ParquetFile(source) as parquet:
                # Not `metadata.schema`: pyarrow 26 would never free the footer.
                return parquet.metadata, parquet.schema_arrow, size

    def _checked_footer(self, index: int) -> pq.FileMetaData:
        """Return the footer of part ``index`` after comparing the file with the schema."""
        file, part = self._parts[index]
        with _user_errors(file, "not a complete Parquet file"):
            footer, found, size = self._read_footer(file)
        pages = (footer.metadata or {}).get(PAGES_KEY, b"").decode()
        if pages != part.pages_sha256 and (other := self._schema.part_of(pages)) is not None:
            raise UserError(
                f"{file}: holds the rows of {other.path}; put each part back in its place or prepare the data set again"
            )
        if footer.num_rows != part.rows:
            raise UserError(f"{file}: has {footer.num_rows} rows, but schema.json has {part.rows}")
        for name, expected in self._types.items():
            index = found.get_field_index(name)
            if index < 0 or not _is_type(found.field(index).type, expected):
                actual = "missing" if index < 0 else _type_name(found.field(index).type)
                raise UserError(f"{file}: column {name} is {actual} instead of {_type_name(expected)}")
        if pages != part.pages_sha256 or size != part.bytes:
            raise UserError(
                f"{file}: is not the file that schema.json describes, such as a part of another data set; put the part "
                "back that belongs there, or prepare the data set again"
            )
        if [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] != part.group_rows:
            raise UserError(
                f"{file}: its row groups do not have {part.row_group_rows:,} rows each, as schema.json says; prepare "
                "the data set again"
            )
        return footer

    def _converted(self, file: DataPath, table: pa.Table) -> Rows:
        labels = [_label(file, table, name, several=len(self._labels) > 1) for name in self._labels]
        dense = np.empty((table.num_rows, len(self._dense)), dtype=np.float32)
        for i, name in enumerate(self._dense):
            dense[:, i] = _values(file, table, name)
        finite = np.isfinite(dense)
        if not finite.all():
            row, index = np.argwhere(~finite)[0]
            raise UserError(
                f"{file}: column {self._dense[index]} holds {dense[row, index]}; it must be a finite number"
            )
        sparse: list[SingleValued | MultiValued] = []
        for multi_valued, features in groupby(self._sparse, key=lambda feature: feature.multi_valued):
            if multi_valued:
                sparse += [_multi_valued(file, table, feature, self._known_ids) for feature in features]
            else:
                sparse.append(_single_valued(file, table, list(features), self._known_ids, self._by_row))
        weights = _sample_weights(file, table) if SAMPLE_WEIGHT in self._types else None
        return Rows(labels[0] if len(labels) == 1 else np.stack(labels, axis=1), dense, tuple(sparse), weights)


def read_windows(
    parts: SplitRows, order: Order, epoch: int, first_batch: int, threads: int
) -> Generator[tuple[Window, Rows], None, None]:
    """Yield each window of ``order`` with its rows, from the window of ``first_batch`` on.

    Threads decode ahead by the row groups of one window, while the batches of the window before are consumed.
    """
    groups = order.groups(epoch)
    starts = np.concatenate([[0], np.cumsum(parts.group_rows[groups])]).tolist()

    def touched(window: Window) -> range:
        """Return the positions of the window's row groups in the epoch's sequence of row groups."""
        if window.start == window.stop:
            return range(0)
        return range(bisect_right(starts, window.start) - 1, bisect_right(starts, window.stop - 1))

    def needed() -> Iterator[int]:
        following = 0  # windows ascend, and two of them may share the row group on their border
        for window in order.windows(epoch, first_batch):
            for position in touched(window):
                if position >= following:
                    following = position + 1
                    yield position

    def decode(position: int) -> tuple[int, Rows]:
        return position, parts.decode(groups[position])

    ahead = threads + 1 + order.window_rows * len(groups) // max(1, order.rows)
    decoded = map_ahead(decode, needed(), threads=threads, ahead=ahead)
    window_groups: deque[tuple[int, Rows]] = deque()
    try:
        for window in order.windows(epoch, first_batch):
            # Drop the row groups before the window, and take those up to its end.
            positions = touched(window)
            while positions and window_groups and window_groups[0][0] < positions[0]:
                window_groups.popleft()
            while positions and (not window_groups or window_groups[-1][0] < positions[-1]):
                window_groups.append(next(decoded))
            slices = [
                rows.slice(max(0, window.start - starts[position]), min(len(rows), window.stop - starts[position]))
                for position, rows in window_groups
                if position in positions
            ]
            yield window, slices[0].join(slices[1:]) if slices else parts.empty()
    finally:
        decoded.close()


def _single_valued(
    file: DataPath, table: pa.Table, features: list[SparseFeature], known_ids: Mapping[str, int], by_row: bool
) -> SingleValued:
    ids = np.empty((table.num_rows, len(features)), dtype=np.int32, order="C" if by_row else "F")
    for index, feature in enumerate(features):
        column = _values(file, table, feature.name)
        _check_ids(file, feature, column)
        ids[:, index] = _known(column, known_ids.get(feature.name))
    return SingleValued(ids)


def _multi_valued(file: DataPath, table: pa.Table, feature: SparseFeature, known_ids: Mapping[str, int]) -> MultiValued:
    offsets, ids = _lists(file, table, feature.name)
    _check_ids(file, feature, ids)
    ids = _known(ids, known_ids.get(feature.name))
    if not feature.weighted:
        return MultiValued(offsets, ids, None)
    weight_offsets, weights = _lists(file, table, _weight(feature))
    if not np.array_equal(offsets, weight_offsets):
        raise UserError(
            f"{file}: a list of column {_weight(feature)} has another length than the list of column {feature.name}"
        )
    finite = np.isfinite(weights)
    if not finite.all():
        wrong = weights[~finite][0]
        raise UserError(f"{file}: column {_weight(feature)} holds {wrong}; it must be a finite number")
    return MultiValued(offsets, ids, weights)


def _label(file: DataPath, table: pa.Table, name: str, *, several: bool) -> npt.NDArray[np.float32]:
    """Return a label, (rows,) float32; NaN where a row lacks this one of several."""
    known = table[name].drop_null().to_numpy() if several else _values(file, table, name)
    wrong = known[(known < 0) | (known > 1)]
    if wrong.size:
        raise UserError(f"{file}: column {name} holds {wrong[0]}; a label must be 0 or 1")
    if len(known) == table.num_rows:
        return np.asarray(known, np.float32)
    labels: npt.NDArray[np.float32] = table[name].cast(pa.float32()).to_numpy(zero_copy_only=False)
    return labels


def _sample_weights(file: DataPath, table: pa.Table) -> npt.NDArray[np.float32]:
    weights = _values(file, table, SAMPLE_WEIGHT)
    wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
    if wrong.size:
        raise UserError(
            f"{file}: column {SAMPLE_WEIGHT} holds {wrong[0]}; a weight must be a finite number of at least 0"
        )
    return weights


def _check_ids(file: DataPath, feature: SparseFeature, ids: npt.NDArray[np.int32]) -> None:
    limit = feature.num_embeddings
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        wrong = ids[(ids < 0) | (ids >= limit)]
        raise UserError(
            f"{file}: column {feature.name} holds id {wrong[0]}, outside [0, {limit}): its table has "
            f"num_embeddings {limit}"
        )


def _known(ids: npt.NDArray[np.int32], known: int | None) -> npt.NDArray[np.int32]:
    """Return ids with 0 in place of those from ``known`` on."""
    return ids if known is None else np.where(ids < known, ids, np.int32(0))


def _values(file: DataPath, table: pa.Table, name: str) -> npt.NDArray[Any]:
    column = table[name]
    _check_complete(file, name, column.null_count)
    return column.to_numpy()


def _lists(file: DataPath, table: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return the offsets (rows + 1,), starting at 0, and the values of all rows' lists."""
    column = table[name].combine_chunks()
    values = column.flatten()
    _check_complete(file, name, column.null_count + values.null_count)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], values.to_numpy()


def _check_complete(file: DataPath, name: str, missing: int) -> None:
    if missing:
        raise UserError(f"{file}: column {name} has {missing} missing values; none are allowed")


def _weight(feature: SparseFeature) -> str:
    return f"{feature.name}.weight"


def _is_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):  # compare without the name of the list's items
        return pa.types.is_list(found) and found.value_type == expected.value_type
    return bool(found == expected)


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _compressed_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def _opened(file: DataPath, block_bytes: int) -> AbstractContextManager[Any]:
    """Return what Arrow opens: a local file's path, or a remote file read in requests of at least ``block_bytes``."""
    return file.open(block_bytes) if isinstance(file, RemotePath) else nullcontext(file)


@contextmanager
def _user_errors(file: DataPath, problem: str) -> Iterator[None]:
    """Turn what reading ``file`` raises into a UserError that names it."""
    # Arrow passes the exceptions of a remote store on unchanged.
    errors = (Exception,) if isinstance(file, RemotePath) else (OSError, pa.ArrowException)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: missing, though the data set's schema.json names it") from None
    except errors as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{file}: {problem}: {first_line}") from error
