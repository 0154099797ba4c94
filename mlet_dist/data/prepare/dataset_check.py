"""Verification of a prepared data set against its schema and manifest (``mlet prepare --check``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlet_dist.data.parquet_parts import PAGES_KEY, sha256_of
from mlet_dist.data.prepare.vocabulary import values_fingerprint
from mlet_dist.data.schema import FILE_NAME, MANIFEST, SAMPLE_WEIGHT, VOCABULARY, DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, load_json, with_checksum
from mlet_dist.progress import Progress


def check(directory: Path) -> DatasetSchema:
    """Verify a data set completely.

    The check reads every file. It compares sizes and checksums; types, labels, dense values and ids of every row; the
    numbers of rows and positives of every part; how often each id occurs in the training split with the vocabulary; and
    pooling factors. There must be no other files.

    Raises:
        UserError: the first error found, with its file.
    """
    schema = DatasetSchema.load(directory)
    manifest = _load_manifest(directory)
    named = {MANIFEST}
    for name, expected in manifest["files"].items():
        _check_file(directory / name, expected["bytes"], expected["sha256"])
        named.add(name)
    for key in ("rows", "positive_rate", "malformed", "num_embeddings"):
        if manifest[key] != getattr(schema, key):
            raise UserError(
                f"{directory / MANIFEST}: {key} is {manifest[key]}, but {FILE_NAME} has {getattr(schema, key)}"
            )
    with Progress("check", sum(schema.rows.values()), "rows") as progress:
        in_training = _counts_of(directory, schema)
        for split, parts in schema.parts.items():
            for part in parts:
                named.add(part.path)
                _check_place(directory, schema, part)
                _check_file(directory / part.path, part.bytes, part.sha256)
                _check_part(directory / part.path, schema, part, in_training if split == "train" else {})
                progress.update(part.rows)
        for feature in schema.sparse:
            _check_counts(directory, schema, feature, in_training[feature.name])
            _check_id_0(directory, schema, feature, in_training[feature.name])
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and str(path.relative_to(directory)) not in named:
            raise UserError(f"{path}: neither {FILE_NAME} nor {MANIFEST} lists this file; remove it")
    return schema


def _load_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        content = load_json(path)
        files = content["files"]
        if not all(isinstance(e["bytes"], int) and isinstance(e["sha256"], str) for e in files.values()):
            raise KeyError("files")
        _ = [content[key] for key in ("rows", "positive_rate", "malformed", "num_embeddings", CHECKSUM)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; `mlet prepare` writes it with the data") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a manifest: {error!r}") from error
    expected: dict[str, Any] = with_checksum(content)
    if content[CHECKSUM] != expected[CHECKSUM]:
        raise UserError(f"{path}: the SHA-256 of its content is {expected[CHECKSUM]} instead of {content[CHECKSUM]}")
    return expected


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        digest = sha256_of(path) if found == size else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if found != size:
        raise UserError(f"{path}: has {found} bytes instead of {size}")
    if digest != sha256:
        raise UserError(f"{path}: its SHA-256 is {digest} instead of {sha256}")


def _check_place(directory: Path, schema: DatasetSchema, part: Part) -> None:
    """Raise UserError if a part's file is another part of the data set."""
    try:
        pages = (pq.read_metadata(directory / part.path).metadata or {}).get(PAGES_KEY, b"").decode()
    except (OSError, pa.ArrowException):
        return  # a missing or damaged file, which `_check_file` describes
    other = schema.part_of(pages)
    if other is not None and pages != part.pages_sha256:
        raise UserError(f"{directory / part.path}: holds the rows of {other.path}; put each part back in its place")


@dataclass
class _Counts:
    """The occurrences of a feature's ids: ``of_id`` of each, in all features of its table; None for a hashed table."""

    vocabulary: Path
    of_id: npt.NDArray[np.int64] | None
    total: int = 0
    zeros: int = 0

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        self.total += ids.size
        if self.of_id is not None:
            self.zeros += ids.size - int(np.count_nonzero(ids))
            np.add.at(self.of_id, ids, 1)  # bincount would allocate the whole table for each row group


def _counts_of(directory: Path, schema: DatasetSchema) -> dict[str, _Counts]:
    """Return the counts of each feature, which are 0."""
    of_tables: dict[str, npt.NDArray[np.int64] | None] = {}
    found = {}
    for feature in schema.sparse:
        table = feature.table_name
        vocabulary = directory / VOCABULARY / f"{table}.parquet"
        if table not in of_tables:
            # A hashed table, which may have 2^31 rows, has none. A missing one is found with the manifest's files.
            of_tables[table] = np.zeros(feature.num_embeddings, np.int64) if vocabulary.exists() else None
        found[feature.name] = _Counts(vocabulary, of_tables[table])
    return found


def _check_part(path: Path, schema: DatasetSchema, part: Part, counted: dict[str, _Counts]) -> None:
    rows = 0
    labels = np.zeros((len(schema.labels), 2), np.int64)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(path, schema, file.schema_arrow)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                rows += table.num_rows
                labels += _check_rows(path, schema, table, counted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a complete Parquet file: {str(error).partition(chr(10))[0]}") from error
    expected_labels = part.label_counts or ((part.positives, part.rows),)
    of_labels = [
        (f"{kind}{'' if len(labels) == 1 else f' of label {label}'}", int(found), expected)
        for label, counts, known in zip(schema.labels, labels, expected_labels, strict=True)
        for kind, found, expected in zip(("positives", "known values"), counts, known, strict=True)
    ]
    for name, found, expected in (("rows", rows, part.rows), *of_labels):
        if found != expected:
            raise UserError(f"{path}: has {found} {name}, but {FILE_NAME} has {expected}")


def _check_columns(path: Path, schema: DatasetSchema, found: pa.Schema) -> None:
    expected: dict[str, pa.DataType] = dict.fromkeys(schema.labels, pa.int8())
    if schema.sample_weight:
        expected[SAMPLE_WEIGHT] = pa.float32()
    expected |= dict.fromkeys(schema.dense, pa.float32())
    for feature in schema.sparse:
        expected[feature.name] = pa.list_(pa.int32()) if feature.multi_valued else pa.int32()
        if feature.weighted:
            expected[f"{feature.name}.weight"] = pa.list_(pa.float32())
    if found.names != list(expected):
        raise UserError(f"{path}: has the columns {', '.join(found.names):.300} instead of those in {FILE_NAME}")
    for name, kind in expected.items():
        actual = found.field(name).type
        same = actual.value_type == kind.value_type if _both_lists(actual, kind) else actual == kind
        if not same:
            raise UserError(f"{path}: column {name} is {actual} instead of {kind}")


def _check_rows(
    path: Path, schema: DatasetSchema, table: pa.Table, counted: dict[str, _Counts]
) -> npt.NDArray[np.int64]:
    """Check the values of a row group, and add its ids to ``counted``; return what parts count of each label."""
    for name in table.column_names:
        if name in schema.more_labels or (name == schema.label and schema.more_labels):
            continue
        column = table[name]
        inner = pc.list_flatten(column).null_count if pa.types.is_list(column.type) else 0
        if column.null_count + inner:
            raise UserError(f"{path}: column {name} has {column.null_count + inner} missing values; none are allowed")
    label_counts = []
    for name in schema.labels:
        labels = table[name].drop_null().to_numpy()
        if ((labels != 0) & (labels != 1)).any():
            wrong_label = labels[(labels != 0) & (labels != 1)][0]
            raise UserError(f"{path}: column {name} holds {wrong_label} instead of 0 or 1")
        label_counts.append((int(labels.sum()), len(labels)))
    weights = [f"{feature.name}.weight" for feature in schema.sparse if feature.weighted]
    for name in (*schema.dense, *weights):
        column = pc.list_flatten(table[name]) if name in weights else table[name]
        if not np.isfinite(column.to_numpy()).all():
            raise UserError(f"{path}: column {name} contains a number that is not finite")
    if schema.sample_weight:
        of_rows = table[SAMPLE_WEIGHT].to_numpy()
        if not (np.isfinite(of_rows) & (of_rows >= 0)).all():
            raise UserError(f"{path}: column {SAMPLE_WEIGHT} contains a weight below 0 or one that is not finite")
    for feature in schema.sparse:
        column = table[feature.name]
        ids = (pc.list_flatten(column) if feature.multi_valued else column).to_numpy()
        if ids.size and (ids.min() < 0 or ids.max() >= feature.num_embeddings):
            wrong = ids[(ids < 0) | (ids >= feature.num_embeddings)][0]
            raise UserError(f"{path}: column {feature.name} holds id {wrong}, outside [0, {feature.num_embeddings})")
        if feature.weighted:
            lengths = (pc.list_value_length(each) for each in (column, table[f"{feature.name}.weight"]))
            if not pc.all(pc.equal(*lengths), min_count=0).as_py():
                raise UserError(
                    f"{path}: lists of {feature.name}.weight have other lengths than those of {feature.name}"
                )
        if feature.name in counted:
            counted[feature.name].add(ids)
    return np.array(label_counts, np.int64)


def _check_counts(directory: Path, schema: DatasetSchema, feature: SparseFeature, counts: _Counts) -> None:
    rows = schema.rows.get("train")  # without it, the factor is that of the data set that this one is like
    pooling = counts.total / rows if rows else 0.0
    if rows is not None and not np.isclose(pooling, feature.pooling_factor, rtol=1e-9):
        raise UserError(
            f"{directory / FILE_NAME}: pooling_factor of {feature.name} is {feature.pooling_factor}, but the training "
            f"split has {pooling} ids per row"
        )
    path = counts.vocabulary
    if counts.of_id is None:
        return
    vocabulary = pq.read_table(path, columns=["value", "count"])
    expected = vocabulary["count"].to_numpy()
    if len(expected) + 1 != feature.num_embeddings:
        raise UserError(f"{path}: has {len(expected)} values, but {FILE_NAME} has {feature.num_embeddings} ids")
    if values_fingerprint(feature.table_name, vocabulary["value"]).hex() != schema.preprocessing.sparse[
        feature.name
    ].get("vocabulary"):
        raise UserError(f"{path}: has other values, or in another order, than those that ids were given to")
    different = np.flatnonzero(counts.of_id[1:] != expected)
    if different.size:
        row = int(different[0])
        raise UserError(
            f"{path}: row {row} has count {expected[row]}, but its id {row + 1} occurs {counts.of_id[row + 1]} times "
            "in the training split"
        )


def _check_id_0(directory: Path, schema: DatasetSchema, feature: SparseFeature, counts: _Counts) -> None:
    recorded = schema.id_counts.get("train", {}).get(feature.name)
    if counts.of_id is not None and recorded is not None and recorded.out_of_vocabulary != counts.zeros:
        raise UserError(
            f"{directory / FILE_NAME}: id_counts has {recorded.out_of_vocabulary} training ids of {feature.name} out "
            f"of vocabulary, but id 0 occurs {counts.zeros} times"
        )


def _both_lists(one: pa.DataType, other: pa.DataType) -> bool:
    return pa.types.is_list(one) and pa.types.is_list(other)
