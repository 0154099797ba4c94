"""``schema.json``, the description of a prepared data set: its features, its tables' sizes, its splits and parts."""

import errno
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlet_dist.data import json_values as values
from mlet_dist.data.column_names import LABEL_NAME_RULE, is_label_name
from mlet_dist.data.id_counts import SplitCounts, counts_from_plain, counts_to_plain
from mlet_dist.data.location import DataPath
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, with_checksum
from mlet_dist.regular_file import read_regular_file

FORMAT_VERSION = 3
SPLITS = ("train", "valid", "test")
FILE_NAME = "schema.json"
MANIFEST, QUARANTINE, VOCABULARY = "manifest.json", "quarantine.jsonl", "vocabulary"  # beside it, of `mlet prepare`
SAMPLE_WEIGHT = "sample_weight"  # name of the column with the weights of rows
ROW_GROUP_ROWS = 1 << 14  # small, so that a rank can skip the rows of the other ranks without decoding them
MAX_NUM_EMBEDDINGS = 2**31 - 1  # ids are int32

_TABLE_SIZE = (
    lambda value: values.is_integer(value, 1, MAX_NUM_EMBEDDINGS),
    f"a whole number from 1 to {MAX_NUM_EMBEDDINGS}",
)
_LABELS = (
    lambda value: len(value) > 1 and len(set(map(str, value))) == len(value) and all(map(is_label_name, value)),
    f"a list of two labels or more, each once: {LABEL_NAME_RULE}",
)
_ROW_GROUP = (lambda value: values.is_integer(value, 1, 2**31 - 1), "a whole number of at least 1")
_BY_SPLIT = (
    lambda value: values.is_object(value) and set(value) <= set(SPLITS),
    f"an object with one or more of the keys {', '.join(SPLITS)}",
)


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature with ids in ``[0, num_embeddings)``.

    Attributes:
        name: name of the column and of the feature.
        num_embeddings: number of rows of its table.
        multi_valued: whether a row holds a list of ids instead of one id.
        weighted: whether each id of a list has a weight; only multi-valued features can be weighted.
        pooling_factor: mean number of ids per row in the training split; 1 where ``multi_valued`` is false.
        table: name of the embedding table, which features with the same ids may share; empty for a table of the
            feature's own name.
    """

    name: str
    num_embeddings: int
    multi_valued: bool = False
    weighted: bool = False
    pooling_factor: float = 1.0
    table: str = ""

    @property
    def table_name(self) -> str:
        """The name of the embedding table."""
        return self.table or self.name


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split.

    Attributes:
        path: path relative to the data set's directory.
        rows: number of rows.
        positives: number of rows with label 1.
        bytes: size of the file.
        sha256: SHA-256 of the file's content, in hexadecimal.
        pages_sha256: SHA-256 of its bytes before the Parquet footer; the footer repeats it.
        row_group_rows: rows of each of its row groups but the last, which has the rest.
        label_counts: with several labels, for each of them the rows with label 1, and the rows that have the label.
    """

    path: str
    rows: int
    positives: int
    bytes: int
    sha256: str
    pages_sha256: str
    row_group_rows: int = ROW_GROUP_ROWS
    label_counts: tuple[tuple[int, int], ...] = ()

    @property
    def group_rows(self) -> list[int]:
        """The rows of each row group."""
        starts = range(0, self.rows, self.row_group_rows)
        return [min(self.row_group_rows, self.rows - start) for start in starts]


@dataclass(frozen=True)
class DatasetSchema:
    """The content of ``schema.json``.

    Attributes:
        source: the raw format, such as ``criteo``, ``avazu`` or ``table``; or ``synthetic``.
        label: name of the label column (int8, 0 or 1), the first if there are several.
        dense: names of the dense columns (float32), already transformed; there may be none.
        sparse: the sparse features (int32 ids).
        malformed: number of raw lines that were skipped.
        parts: the Parquet files of each split that the data set has, in row order. Only a data set that was prepared
            like another one may lack train.
        preprocessing: how each column was made.
        vocabulary_id: fingerprint of the mapping from values to ids; equal for data sets with the same mapping.
        extends: the ``vocabulary_id`` of the data sets whose mapping this one has grown from, the oldest first.
        id_counts: how many ids of each split and feature are out of vocabulary; empty where that is not known.
        sample_weight: whether the column ``sample_weight`` (float32, 0 or more) holds each row's weight in the loss and
            in metrics.
        more_labels: names of the other label columns. With several labels, a row may lack some of them (null).
    """

    source: str
    label: str
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    malformed: int
    parts: dict[str, tuple[Part, ...]]
    preprocessing: Preprocessing
    vocabulary_id: str = ""
    id_counts: SplitCounts = field(default_factory=dict)
    sample_weight: bool = False
    extends: tuple[str, ...] = ()
    more_labels: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of all label columns, in order."""
        return self.label, *self.more_labels

    @property
    def label_counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Of each split and label, the number of rows with label 1, and of rows that have the label."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for split, parts in self.parts.items():
            of_parts = [part.label_counts or ((part.positives, part.rows),) for part in parts]
            found[split] = {
                name: (sum(each[index][0] for each in of_parts), sum(each[index][1] for each in of_parts))
                for index, name in enumerate(self.labels)
            }
        return found

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {split: sum(part.rows for part in parts) for split, parts in self.parts.items()}

    def check_split(self, path: DataPath, split: str) -> None:
        """Raise UserError unless the data set, which lies at ``path``, has the split."""
        if split not in self.parts:
            raise UserError(f"{path}: has no {split} split; its splits are {' and '.join(self.parts)} (see --split)")

    def content_id(self, split: str) -> str:
        """Return the fingerprint of a split's files in order: 16 hexadecimal digits."""
        sums = "".join(part.sha256 for part in self.parts.get(split, ()))
        return hashlib.sha256(sums.encode()).hexdigest()[:16]

    def part_of(self, pages_sha256: str) -> Part | None:
        """Return the part that has these pages, if any; for messages about files in the place of others."""
        return next(
            (part for parts in self.parts.values() for part in parts if part.pages_sha256 == pages_sha256), None
        )

    @property
    def positives(self) -> dict[str, int]:
        """Number of rows with label 1, the first label, of each split."""
        return {split: sum(part.positives for part in parts) for split, parts in self.parts.items()}

    @property
    def positive_rate(self) -> dict[str, float]:
        """Share of rows with label 1 in each split; NaN where it has no rows."""
        return {split: self.positives[split] / rows if rows else math.nan for split, rows in self.rows.items()}

    @property
    def untrained_first_rows(self) -> tuple[str, ...]:
        """The tables whose row 0, out of vocabulary, no row of the training split looks up."""
        counts = self.id_counts.get("train", {})
        trained = {f.table_name for f in self.sparse if f.name not in counts or counts[f.name].out_of_vocabulary != 0}
        return tuple(dict.fromkeys(f.table_name for f in self.sparse if f.table_name not in trained))

    @property
    def num_embeddings(self) -> dict[str, int]:
        """``num_embeddings`` of each sparse feature."""
        return {feature.name: feature.num_embeddings for feature in self.sparse}

    @property
    def table_sizes(self) -> dict[str, int]:
        """``num_embeddings`` of each embedding table."""
        return {feature.table_name: feature.num_embeddings for feature in self.sparse}

    def save(self, directory: Path) -> None:
        """Write ``directory/schema.json``."""
        content = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "label": list(self.labels) if self.more_labels else self.label,
            "dense": list(self.dense),
            "sparse": [_plain_feature(feature) for feature in self.sparse],
            "malformed": self.malformed,
            "preprocessing": self.preprocessing.to_dict(),
            "vocabulary_id": self.vocabulary_id,
            "rows": self.rows,
            "parts": {split: [_plain_part(part) for part in parts] for split, parts in self.parts.items()},
        }
        if self.id_counts:
            content["id_counts"] = counts_to_plain(self.id_counts)
        if self.sample_weight:
            content["sample_weight"] = True
        if self.extends:
            content["extends"] = list(self.extends)
        (directory / FILE_NAME).write_text(json.dumps(with_checksum(content), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: DataPath) -> "DatasetSchema":
        """Read ``directory/schema.json``.

        Raises:
            UserError: the directory or the file is missing, unreadable, not JSON, of another format version,
                lacks a key, holds an invalid value or was changed.
        """
        path = directory / FILE_NAME
        try:
            text = read_regular_file(path).decode() if isinstance(path, Path) else path.read_text(encoding="utf-8")
            content = json.loads(text)
        except FileNotFoundError as error:
            if directory.is_dir():
                problem = f"no {FILE_NAME} in it, so it is not a prepared data set; run `mlet prepare` to make one"
            else:
                # A store may say more, such as that the bucket does not exist.
                reason = "" if error.strerror == os.strerror(errno.ENOENT) else f" ({error.strerror})"
                problem = f"no such data set{reason}; run `mlet prepare` to make one"
            raise UserError(f"{directory}: {problem}") from None
        except NotADirectoryError:
            raise UserError(f"{directory}: is a file; a data set is a directory made by `mlet prepare`") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # broken JSON, not UTF-8 or nested too deeply
            raise UserError(f"{path}: not valid JSON: {error}") from error
        return cls._parse(path, content)

    @classmethod
    def _parse(cls, path: DataPath, content: Any) -> "DatasetSchema":
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a JSON {type(content).__name__} instead of an object")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {version!r}, but this version of mlet_dist reads {FORMAT_VERSION}; "
                "prepare the data set again"
            )
        take = partial(values.take, path)
        parts, rows = (take(content, key, *_BY_SPLIT) for key in ("parts", "rows"))
        label, *more_labels = _names_of_labels(path, content)
        schema = cls(
            source=take(content, "source", *values.TEXT),
            label=label,
            more_labels=tuple(more_labels),
            dense=tuple(take(content, "dense", *values.NAMES)),
            sparse=tuple(
                SparseFeature(
                    take(f, "name", *values.TABLE_NAME, within),
                    take(f, "num_embeddings", *_TABLE_SIZE, within),
                    take(f, "multi_valued", *values.FLAG, within),
                    take(f, "weighted", *values.FLAG, within),
                    float(take(f, "pooling_factor", *values.POOLING_FACTOR, within)),
                    take({"table": f.get("name")} | f, "table", *values.TABLE_NAME, within) if f.get("table") else "",
                )
                for within, f in values.enumerated("sparse", take(content, "sparse", *values.FEATURES))
            ),
            malformed=take(content, "malformed", *values.COUNT),
            parts={
                split: tuple(
                    Part(
                        take(p, "path", *values.PART_PATH, within),
                        take(p, "rows", *values.COUNT, within),
                        take(p, "positives", *values.COUNT, within),
                        take(p, "bytes", *values.COUNT, within),
                        take(p, "sha256", *values.SHA256, within),
                        take(p, "pages_sha256", *values.SHA256, within),
                        take({"row_group_rows": ROW_GROUP_ROWS} | p, "row_group_rows", *_ROW_GROUP, within),
                        _label_counts(path, p, within, len(more_labels) + 1 if more_labels else 0),
                    )
                    for within, p in values.enumerated(f"parts.{split}", take(parts, split, *values.OBJECTS, "parts."))
                )
                for split in SPLITS
                if split in parts or (split == "train" and not parts)
            },
            preprocessing=_preprocessing(path, take(content, "preprocessing", *values.OBJECT)),
            vocabulary_id=take(content, "vocabulary_id", *values.TEXT),
            id_counts=counts_from_plain(content.get("id_counts", {}), path),
            sample_weight=take({"sample_weight": False} | content, "sample_weight", *values.FLAG),
            extends=tuple(take({"extends": []} | content, "extends", *values.TEXTS)),
        )
        for index, feature in enumerate(schema.sparse):
            if feature.multi_valued:
                continue
            if feature.weighted or feature.pooling_factor != 1:
                raise UserError(
                    f"{path}: sparse[{index}]: {feature.name!r} holds one id a row, so weighted must be false and "
                    "pooling_factor 1"
                )
        sizes: dict[str, SparseFeature] = {}
        for feature in schema.sparse:
            other = sizes.setdefault(feature.table_name, feature)
            if other.num_embeddings != feature.num_embeddings:
                raise UserError(
                    f"{path}: features {other.name!r} and {feature.name!r} share the table {feature.table_name!r}, so "
                    "num_embeddings must be the same"
                )
        columns = dict.fromkeys(schema.labels, "label")
        if schema.sample_weight:
            columns[SAMPLE_WEIGHT] = "sample_weight"
        for key, name in (*(("dense", n) for n in schema.dense), *(("sparse", f.name) for f in schema.sparse)):
            if name in columns:
                raise UserError(
                    f"{path}: {key} names {name!r}, which {columns[name]} names already; give each column once"
                )
            columns[name] = key
        if schema.rows != rows:
            raise UserError(f"{path}: rows is {values.show(rows)}, but the parts add up to {values.show(schema.rows)}")
        made = schema.preprocessing
        for key, wanted, found in (("dense", schema.dense, made.dense), ("sparse", schema.num_embeddings, made.sparse)):
            if found.keys() != set(wanted):
                raise UserError(
                    f"{path}: preprocessing.{key} names {values.show([*found])}, but {key} {values.show([*wanted])}"
                )
        found_sum, expected = take(content, CHECKSUM, *values.SHA256), with_checksum(content)[CHECKSUM]
        if found_sum != expected:
            raise UserError(
                f"{path}: the SHA-256 of its content is {expected} instead of {found_sum}; prepare the data set again"
            )
        return schema


def _plain_feature(feature: SparseFeature) -> dict[str, Any]:
    """Return the feature as plain data for JSON; ``table`` only where it has another name."""
    return {key: value for key, value in asdict(feature).items() if key != "table" or value}


def _plain_part(part: Part) -> dict[str, Any]:
    """Return the part as plain data for JSON; ``row_group_rows`` only where it is another number than usual."""
    usual = {"row_group_rows": ROW_GROUP_ROWS, "label_counts": ()}
    return {key: value for key, value in asdict(part).items() if key not in usual or value != usual[key]}


def _names_of_labels(path: DataPath, content: dict[str, Any]) -> list[str]:
    """Return the names of the labels: one name, or a list of several."""
    if not isinstance(content.get("label"), list):
        return [values.take(path, content, "label", *values.NAME)]
    names: list[str] = values.take(path, content, "label", *_LABELS)
    return names


def _label_counts(path: DataPath, part: dict[str, Any], within: str, labels: int) -> tuple[tuple[int, int], ...]:
    """Return the counts of a part by label; none with one label."""
    if not labels:
        return ()
    valid = (
        lambda value: (
            isinstance(value, list)
            and len(value) == labels
            and all(
                isinstance(each, list)
                and len(each) == 2
                and all(values.is_integer(n, 0, part["rows"]) for n in each)
                and each[0] <= each[1]
                for each in value
            )
        ),
        "for each label the number of rows with label 1, and of rows that have it",
    )
    return tuple((ones, known) for ones, known in values.take(path, part, "label_counts", *valid, within))


def _preprocessing(path: DataPath, plain: dict[str, Any]) -> Preprocessing:
    try:
        return Preprocessing.from_dict(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: preprocessing does not tell how each column was made: {error!r}") from None
