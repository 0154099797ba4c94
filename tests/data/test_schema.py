"""Tests of mlet_dist.data.schema."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlet_dist.data.column_names import MODULE_ATTRIBUTES
from mlet_dist.data.id_counts import IdCounts
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.data.schema import DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError

SCHEMA = DatasetSchema(
    source="criteo",
    label="label",
    dense=("I1", "I2"),
    sparse=(SparseFeature("C1", 10), SparseFeature("C2", 3, multi_valued=True, weighted=True, pooling_factor=2.5)),
    malformed=1,
    parts={
        "train": (
            Part("train/part-00000.parquet", 5, 1, 100, 64 * "a", 64 * "1"),
            Part("train/part-00001.parquet", 3, 3, 90, 64 * "b", 64 * "2"),
        ),
        "valid": (Part("valid/part-00000.parquet", 1, 0, 50, 64 * "c", 64 * "3"),),
        "test": (Part("test/part-00000.parquet", 1, 1, 50, 64 * "d", 64 * "4"),),
    },
    preprocessing=Preprocessing(
        {"column": "clicked", "positive_from": 0.5},
        {
            "I1": {"transform": "standardise", "missing": "mean", "mean": 3.1, "deviation": 2.2},
            "I2": {"transform": "raw"},
        },
        {"C1": {"encoding": "vocabulary", "vocabulary": "ab"}, "C2": {"encoding": "hash", "num_embeddings": 3}},
    ),
    vocabulary_id="0123abcd",
)


def test_save_then_load_gives_the_same(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    assert DatasetSchema.load(tmp_path) == SCHEMA


def test_derived_values() -> None:
    assert SCHEMA.rows == {"train": 8, "valid": 1, "test": 1}
    assert SCHEMA.num_embeddings == {"C1": 10, "C2": 3}
    assert SCHEMA.positive_rate == {"train": 0.5, "valid": 0.0, "test": 1.0}
    assert math.isnan(dataclasses.replace(SCHEMA, parts=SCHEMA.parts | {"test": ()}).positive_rate["test"])


def test_content_id_depends_on_the_files_in_order() -> None:
    first, second = SCHEMA.parts["train"]
    others = [(second, first), (first,), (first, dataclasses.replace(second, sha256=64 * "e"))]
    found = {dataclasses.replace(SCHEMA, parts=SCHEMA.parts | {"train": parts}).content_id("train") for parts in others}
    assert len(found | {SCHEMA.content_id("train")}) == 4
    without_test = dataclasses.replace(SCHEMA, parts=SCHEMA.parts | {"test": ()})
    assert without_test.content_id("train") == SCHEMA.content_id("train")


def test_no_table_may_have_the_name_of_a_module_s_attribute() -> None:
    """torch refuses some of these as keys of a ModuleDict or ParameterDict, and silently replaces others."""
    attributes = {*dir(torch.nn.ModuleDict()), *dir(torch.nn.ParameterDict())}
    assert {name for name in attributes if not name.startswith("_")} == MODULE_ATTRIBUTES


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
        (b"[" * 100_000, r"schema\.json: not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (
            b'{"format_version": 2}',
            "format_version is 2, but this version of mlet_dist reads 3; prepare the data set again",
        ),
        (b"{}", "format_version is None"),
    ],
)
def test_content_that_is_not_a_schema(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "schema.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        DatasetSchema.load(tmp_path)


OPTIONAL = {"id_counts", "sample_weight", "extends", "more_labels"}


def test_a_data_set_that_has_grown_may_lack_the_training_split(tmp_path: Path) -> None:
    parts = {split: each for split, each in SCHEMA.parts.items() if split != "train"}
    schema = dataclasses.replace(SCHEMA, parts=parts, extends=("one", "two"))
    schema.save(tmp_path)
    assert DatasetSchema.load(tmp_path) == schema


@pytest.mark.parametrize("key", sorted({f.name for f in dataclasses.fields(DatasetSchema)} - OPTIONAL | {"rows"}))
def test_missing_key(tmp_path: Path, key: str) -> None:
    SCHEMA.save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text())
    del content[key]
    (tmp_path / "schema.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"key '{key}' is missing"):
        DatasetSchema.load(tmp_path)


def sparse(name: object, num_embeddings: object = 9, **changes: object) -> dict[str, object]:
    whole = {"name": name, "num_embeddings": num_embeddings, "multi_valued": False, "weighted": False}
    return whole | {"pooling_factor": 1.0} | changes


def part(**changes: object) -> dict[str, object]:
    return {"path": "a", "rows": 8, "positives": 3, "bytes": 9, "sha256": 64 * "0", "pages_sha256": 64 * "1"} | changes


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("source", None, "source is null; it must be text"),
        ("label", 5, "label is 5; it must be a column's name"),
        ("label", "", 'label is ""; it must be a column\'s name'),
        ("dense", [1, 2], "dense is [1, 2]; it must be a list of columns' names"),
        ("dense", "I1", 'dense is "I1"; it must be a list'),
        (
            "dense",
            ["I1", "a/b"],
            'dense is ["I1", "a/b"]; it must be a list of columns\' names: printable text of 1 to 200 bytes',
        ),
        ("dense", ["I1", "I1"], "dense names 'I1', which dense names already"),
        ("dense", ["label"], "dense names 'label', which label names already"),
        ("dense", ["C1"], "sparse names 'C1', which dense names already"),
        ("sparse", [sparse("C1"), sparse("C1")], "sparse names 'C1', which sparse names already"),
        ("sparse", [], "sparse is []; it must be a list of one object or more"),
        ("sparse", ["C1"], 'sparse is ["C1"]; it must be a list of one object or more'),
        ("sparse", [sparse("C1"), {"name": "C2"}], "key 'sparse[1].num_embeddings' is missing"),
        ("sparse", [sparse(3)], "sparse[0].name is 3; it must be a table's name"),
        (
            "sparse",
            [sparse("C1"), sparse("C.2")],
            'sparse[1].name is "C.2"; it must be a table\'s name: printable text',
        ),
        ("sparse", [sparse("../C1")], 'sparse[0].name is "../C1"; it must be'),
        ("sparse", [sparse("C1", "many")], 'sparse[0].num_embeddings is "many"; it must be a whole number from 1 to'),
        ("sparse", [sparse("C1", True)], "sparse[0].num_embeddings is true; it must be"),
        ("sparse", [sparse("C1", 9.0)], "sparse[0].num_embeddings is 9.0; it must be"),
        ("sparse", [sparse("C1", 0)], "sparse[0].num_embeddings is 0; it must be a whole number from 1 to 2147483647"),
        ("sparse", [sparse("C1", -5)], "sparse[0].num_embeddings is -5; it must be"),
        ("sparse", [sparse("C1", 2**31)], "sparse[0].num_embeddings is 2147483648; it must be"),
        (
            "sparse",
            [sparse("items")],
            'sparse[0].name is "items"; it must be a table\'s name: printable text',
        ),
        ("sparse", [sparse("_C")], 'sparse[0].name is "_C"; it must be a table\'s name'),
        ("sparse", [sparse("C1", multi_valued=1)], "sparse[0].multi_valued is 1; it must be true or false"),
        ("sparse", [sparse("C1", weighted="no")], 'sparse[0].weighted is "no"; it must be true or false'),
        ("sparse", [sparse("C1", pooling_factor=-1)], "sparse[0].pooling_factor is -1; it must be a number, 0 or more"),
        ("sparse", [sparse("C1", weighted=True)], "sparse[0]: 'C1' holds one id a row, so weighted must be false"),
        ("sparse", [sparse("C1", pooling_factor=2.0)], "sparse[0]: 'C1' holds one id a row, so weighted must be false"),
        ("malformed", -1, "malformed is -1; it must be a whole number, 0 or more"),
        ("preprocessing", 3, "preprocessing is 3; it must be an object"),
        ("preprocessing", {"label": {}, "dense": {}}, "preprocessing does not tell how each column was made: KeyError"),
        (
            "preprocessing",
            {"label": {}, "dense": {"I1": {}}, "sparse": {"C1": {}, "C2": {}}},
            'preprocessing.dense names ["I1"], but dense ["I1", "I2"]',
        ),
        ("parts", {"train": [part(pages_sha256=7)]}, "parts.train[0].pages_sha256 is 7; it must be 64 hexadecimal"),
        ("malformed", 2, "the SHA-256 of its content is "),
        ("sha256", 64 * "0", "the SHA-256 of its content is "),
        ("vocabulary_id", 7, "vocabulary_id is 7; it must be text"),
        ("parts", 3, "parts is 3; it must be an object with one or more of the keys train, valid, test"),
        ("parts", {"train": "x"}, 'parts.train is "x"; it must be a list of objects'),
        ("parts", {"train": [part(rows="8")]}, 'parts.train[0].rows is "8"; it must be a whole number'),
        ("parts", {"train": [part(bytes=-8)]}, "parts.train[0].bytes is -8; it must be a whole number"),
        ("parts", {"train": [part(sha256="0x")]}, 'parts.train[0].sha256 is "0x"; it must be 64 hexadecimal digits'),
        *(
            (
                "parts",
                {"train": [part(path=path)]},
                f"parts.train[0].path is {json.dumps(path)}; it must be the",
            )
            for path in (7, "", ".", "/etc/passwd", "../other/part.parquet", "train/../../part.parquet", "a\0b")
        ),
        ("parts", {"train": [], "dev": []}, "parts is {"),
        ("parts", {}, "key 'parts.train' is missing"),
        ("parts", {"valid": [], "test": []}, "the parts add up to"),
        ("extends", "v", 'extends is "v"; it must be a list of texts'),
        ("rows", {"train": 9, "valid": 1, "test": 1}, "the parts add up to"),
        ("rows", 10, "rows is 10; it must be an object"),
        ("source", 1000 * [1], "…; it must be text"),
    ],
)
def test_wrong_value(tmp_path: Path, key: str, value: object, message: str) -> None:
    SCHEMA.save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text())
    (tmp_path / "schema.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        DatasetSchema.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/schema.json: ")
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("schema", ("torch", "pyarrow")), ("prepare.pipeline", ("torch",)), ("synthetic", ("torch",))],
)
def test_imports_stay_light(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, mlet_dist.data.{module}; print(*[m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("absent", [("valid",), ("test",), ("valid", "test")])
def test_a_data_set_may_lack_splits(tmp_path: Path, absent: tuple[str, ...]) -> None:
    schema = dataclasses.replace(SCHEMA, parts={s: parts for s, parts in SCHEMA.parts.items() if s not in absent})
    schema.save(tmp_path)
    assert DatasetSchema.load(tmp_path) == schema
    assert set(schema.rows) == set(schema.positive_rate) == {"train", "valid", "test"} - set(absent)
    with pytest.raises(UserError, match=f"{tmp_path}: has no {absent[0]} split; its splits are train"):
        schema.check_split(tmp_path, absent[0])
    schema.check_split(tmp_path, "train")


def test_optional_keys_are_read_back_and_may_be_missing(tmp_path: Path) -> None:
    counts = {"train": {"C1": IdCounts(20, 3, 0)}, "test": {"C1": IdCounts(5, 5, 0)}}
    for schema in (SCHEMA, dataclasses.replace(SCHEMA, id_counts=counts, sample_weight=True, extends=("a",))):
        schema.save(tmp_path)
        assert DatasetSchema.load(tmp_path) == schema
        keys = OPTIONAL - {"more_labels"}  # part of `label`
        assert OPTIONAL & set(json.loads((tmp_path / "schema.json").read_text())) == (
            keys if schema.sample_weight else set()
        )
