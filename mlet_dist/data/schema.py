"""What a prepared data set holds: its features, their vocabularies' sizes, its splits and its parts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
FILE_NAME = "schema.json"


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature whose ids are in ``[0, num_embeddings)``; id 0 is out of vocabulary."""

    name: str
    num_embeddings: int


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split; ``path`` is relative to the data set's directory."""

    path: str
    rows: int


@dataclass(frozen=True)
class DatasetSchema:
    """The content of ``schema.json``.

    Attributes:
        source: ``criteo`` or ``synthetic``.
        label: name of the label column (int8, 0 or 1).
        dense: names of the float32 columns, already transformed.
        sparse: the int32 id columns, one id a row.
        min_count: a value seen fewer times than this in the training split has id 0.
        malformed: raw lines that were skipped.
        vocabulary: whether ``vocabulary/<feature>.parquet`` says which raw value each id stands for.
        positive_rate: share of rows with label 1, by split.
        parts: the Parquet files in row order, by split.
    """

    source: str
    label: str
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    min_count: int
    malformed: int
    vocabulary: bool
    positive_rate: dict[str, float]
    parts: dict[str, tuple[Part, ...]]

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {split: sum(part.rows for part in parts) for split, parts in self.parts.items()}

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Number of ids of each sparse feature."""
        return {feature.name: feature.num_embeddings for feature in self.sparse}

    def save(self, directory: Path) -> None:
        """Write ``directory/schema.json``."""
        content = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "label": self.label,
            "dense": list(self.dense),
            "sparse": [{"name": f.name, "num_embeddings": f.num_embeddings} for f in self.sparse],
            "min_count": self.min_count,
            "malformed": self.malformed,
            "vocabulary": self.vocabulary,
            "rows": self.rows,
            "positive_rate": self.positive_rate,
            "parts": {split: [{"path": p.path, "rows": p.rows} for p in parts] for split, parts in self.parts.items()},
        }
        (directory / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "DatasetSchema":
        """Read ``directory/schema.json``.

        Raises:
            UserError: the directory or the file is missing, unreadable, not JSON, of another format version, or
                lacks a key.
        """
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if directory.is_dir():
                problem = f"no {FILE_NAME} in it, so it is not a prepared data set; run `mlet prepare` to make one"
            else:
                problem = "no such data set; run `mlet prepare` to make one"
            raise UserError(f"{directory}: {problem}") from None
        except NotADirectoryError:
            raise UserError(f"{directory}: a file, but a data set is a directory made by `mlet prepare`") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # broken JSON or not UTF-8
            raise UserError(f"{path}: not valid JSON: {error}") from error
        return cls._parse(path, content)

    @classmethod
    def _parse(cls, path: Path, content: Any) -> "DatasetSchema":
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a JSON {type(content).__name__} instead of an object")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {version!r}, but this version of mlet_dist reads {FORMAT_VERSION}; "
                "prepare the data set again"
            )
        try:
            schema = cls(
                source=content["source"],
                label=content["label"],
                dense=tuple(content["dense"]),
                sparse=tuple(SparseFeature(f["name"], int(f["num_embeddings"])) for f in content["sparse"]),
                min_count=content["min_count"],
                malformed=content["malformed"],
                vocabulary=content["vocabulary"],
                positive_rate={split: float(content["positive_rate"][split]) for split in SPLITS},
                parts={
                    split: tuple(Part(p["path"], int(p["rows"])) for p in content["parts"][split]) for split in SPLITS
                },
            )
            recorded = {split: content["rows"][split] for split in SPLITS}
        except KeyError as error:
            raise UserError(f"{path}: key {error} is missing; prepare the data set again") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: a value has the wrong type ({error}); prepare the data set again") from None
        if schema.rows != recorded:
            raise UserError(f"{path}: rows is {recorded}, but the parts add up to {schema.rows}")
        return schema
