"""Tests of mlet_dist.data.schema."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlet_dist.data.schema import DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError

SCHEMA = DatasetSchema(
    source="criteo",
    label="label",
    dense=("I1", "I2"),
    sparse=(SparseFeature("C1", 10), SparseFeature("C2", 3)),
    min_count=2,
    malformed=1,
    vocabulary=True,
    positive_rate={"train": 0.25, "valid": 0.5, "test": 0.0},
    parts={
        "train": (Part("train/part-00000.parquet", 5), Part("train/part-00001.parquet", 3)),
        "valid": (Part("valid/part-00000.parquet", 1),),
        "test": (Part("test/part-00000.parquet", 1),),
    },
)


def test_save_then_load_gives_the_same(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    assert DatasetSchema.load(tmp_path) == SCHEMA


def test_derived_values() -> None:
    assert SCHEMA.rows == {"train": 8, "valid": 1, "test": 1}
    assert SCHEMA.num_embeddings == {"C1": 10, "C2": 3}


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such data set; run `mlet prepare`"):
        DatasetSchema.load(tmp_path / "nowhere")


def test_directory_that_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a prepared data set; run `mlet prepare`"):
        DatasetSchema.load(tmp_path)


def test_file_instead_of_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a data set is a directory"):
        DatasetSchema.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format_version": 1,', r"schema\.json: not valid JSON"),
        (b"\xff\xfe", r"schema\.json: not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"format_version": 2}', "format_version is 2, but this version of mlet_dist reads 1"),
        (b"{}", "format_version is None"),
    ],
)
def test_content_that_is_no_schema(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "schema.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        DatasetSchema.load(tmp_path)


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(DatasetSchema)] + ["rows"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    SCHEMA.save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text())
    del content[key]
    (tmp_path / "schema.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"key '{key}' is missing"):
        DatasetSchema.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparse", [{"name": "C1", "num_embeddings": "many"}], "wrong type"),
        ("parts", 3, "wrong type"),
        ("rows", {"train": 9, "valid": 1, "test": 1}, "the parts add up to"),
    ],
)
def test_wrong_value(tmp_path: Path, key: str, value: object, message: str) -> None:
    SCHEMA.save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text())
    (tmp_path / "schema.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=message):
        DatasetSchema.load(tmp_path)


@pytest.mark.parametrize(
    ("module", "forbidden"), [("schema", ("torch", "pyarrow")), ("prepare", ("torch",)), ("synthetic", ("torch",))]
)
def test_imports_stay_light(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, mlet_dist.data.{module}; print(*[m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
