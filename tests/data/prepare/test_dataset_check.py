"""Tests of `mlet prepare --check`: every change of a data set is found, and its file named."""

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist.data.parquet_parts import sha256_of
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema, Part
from mlet_dist.errors import UserError
from mlet_dist.formatting import with_checksum
from tests.helpers.data_set_parts import write_part

PART = "train/part-00000.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set with every kind of column; tests must not change it."""
    path = tmp_path_factory.mktemp("check")
    lines = ["y,a,x,l,w,h", *(f"{i % 2},{i},v{i % 7},p{i % 3}|q,{i}|1,{i}" for i in range(100)), "bad"]
    (path / "raw.csv").write_text("\n".join(lines))
    description = {
        "format": "csv",
        "label": {"column": "y"},
        "dense": [{"column": "a"}],
        "sparse": [
            {"column": "x"},
            {"column": "l", "separator": "|", "weights": "w"},
            {"column": "h", "encoding": "hash", "num_embeddings": 50},
        ],
    }
    (path / "table.yaml").write_text(yaml.safe_dump(description))
    prepare(load_table(path / "table.yaml"), [path / "raw.csv"], path / "out")
    return path / "out"


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the data set that a test may change."""
    return shutil.copytree(whole, tmp_path / "data")


def rewrite(data: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a part's rows, and update the schema and the manifest to the new file."""
    table = change(pq.read_table(data / PART))
    schema = DatasetSchema.load(data)
    old = schema.parts["train"][0]
    entry = write_part(data, PART, table)
    part = Part(**entry | {"rows": old.rows, "positives": old.positives})
    save(data, dataclasses.replace(schema, parts=schema.parts | {"train": (part,)}))


def save(data: Path, schema: DatasetSchema) -> None:
    schema.save(data)
    manifest = json.loads((data / "manifest.json").read_text())
    path = data / "schema.json"
    manifest["files"]["schema.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (data / "manifest.json").write_text(json.dumps(with_checksum(manifest)))


def set_column(name: str, values: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values(table[name]))


def first(value: object) -> Callable[[pa.ChunkedArray], pa.ChunkedArray]:
    return lambda column: pa.chunked_array([pa.array([value, *column.to_pylist()[1:]], column.type)])


def test_a_prepared_data_set_passes(whole: Path) -> None:
    assert check(whole) == DatasetSchema.load(whole)
    assert [(f.multi_valued, f.weighted, f.pooling_factor) for f in check(whole).sparse][1] == (True, True, 2.0)


@pytest.mark.parametrize(
    "name", [PART, "valid/part-00000.parquet", "vocabulary/x.parquet", "quarantine.jsonl", "schema.json"]
)
def test_one_changed_byte(changed: Path, name: str) -> None:
    content = bytearray((changed / name).read_bytes())
    position = content.index(b"train/") if name == "schema.json" else len(content) // 2
    content[position] ^= 1
    (changed / name).write_bytes(content)
    found = "the SHA-256 of its content" if name == "schema.json" else "its SHA-256"
    with pytest.raises(UserError, match=f"{changed / name}: {found} is [0-9a-f]{{64}} instead of [0-9a-f]{{64}}"):
        check(changed)


@pytest.mark.parametrize("name", [PART, "vocabulary/x.parquet", "quarantine.jsonl"])
def test_missing_and_shortened_files(changed: Path, name: str) -> None:
    content = (changed / name).read_bytes()
    (changed / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{changed / name}: has {len(content) - 1} bytes instead of {len(content)}$"):
        check(changed)
    (changed / name).unlink()
    with pytest.raises(UserError, match=f"{changed / name}: cannot be read: No such file"):
        check(changed)


def test_file_that_is_not_listed(changed: Path) -> None:
    (changed / "train/part-00009.parquet").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"part-00009\.parquet: neither schema\.json nor manifest\.json lists this file"
    ):
        check(changed)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": 1}}', '{"files": {}, "rows": 1}'])
def test_file_that_is_not_a_manifest(changed: Path, content: str) -> None:
    (changed / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: is not a manifest"):
        check(changed)
    (changed / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        check(changed)


def test_manifest_that_contradicts_the_schema(changed: Path) -> None:
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(with_checksum(manifest | {"malformed": 7})))
    with pytest.raises(UserError, match=r"manifest\.json: malformed is 7, but schema\.json has 1"):
        check(changed)


@pytest.mark.parametrize("key", ["mlet_dist", "source", "arguments", "inputs", "standardised", "sha256", "new"])
def test_manifest_that_was_changed(changed: Path, key: str) -> None:
    """Keys that no other file repeats are covered by the manifest's own checksum, which is recomputed here."""
    manifest = json.loads((changed / "manifest.json").read_text())
    rest = {each: value for each, value in manifest.items() if each != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert manifest["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    (changed / "manifest.json").write_text(json.dumps(manifest | {key: "other"}))
    with pytest.raises(UserError, match=r"manifest\.json: the SHA-256 of its content is [0-9a-f]{64} instead of \w+$"):
        check(changed)
    (changed / "manifest.json").write_text(json.dumps(rest))
    with pytest.raises(UserError, match=r"manifest\.json: is not a manifest: KeyError\('sha256'\)"):
        check(changed)


ROWS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a missing row": (lambda table: table.slice(1), r"has 79 rows, but schema\.json has 80"),
    "a changed label": (set_column("label", first(1)), r"has 41 positives, but schema\.json has 40"),
    "a label of 2": (set_column("label", first(2)), "column label holds 2 instead of 0 or 1"),
    "missing": (set_column("a", first(None)), "column a has 1 missing values"),
    "NaN": (set_column("a", first(float("nan"))), "column a contains a number that is not finite"),
    "id too large": (set_column("x", first(8)), r"column x holds id 8, outside \[0, 8\)"),
    "negative id": (set_column("h", first(-1)), r"column h holds id -1, outside \[0, 50\)"),
    "swapped id": (set_column("x", first(7)), "row 0 has count 12, but its id 1 occurs 11 times in the training split"),
    "id in a list": (set_column("l", first([1, 99])), r"column l holds id 99, outside \[0, 5\)"),
    "null in a list": (set_column("l", first([1, None])), "column l has 1 missing values"),
    "longer list": (set_column("l", first([1, 1, 1])), "lists of l.weight have other lengths than those of l"),
    "infinite weight": (
        set_column("l.weight", first([1, float("inf")])),
        "column l.weight contains a number that is not",
    ),
    "type": (set_column("x", lambda column: pc.cast(column, pa.int64())), "column x is int64 instead of int32"),
    "list for one": (set_column("l", lambda column: column.combine_chunks().value_lengths()), "column l is int32 inst"),
    "order of columns": (lambda table: table.select(table.column_names[::-1]), "has the columns h, l.weight, l, x, a"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_changed_rows_with_matching_checksums(changed: Path, kind: str) -> None:
    change, message = ROWS[kind]
    rewrite(changed, change)
    with pytest.raises(UserError, match=message):
        check(changed)


def test_pooling_factor(changed: Path) -> None:
    schema = DatasetSchema.load(changed)
    wrong = tuple(dataclasses.replace(f, pooling_factor=1.5) if f.multi_valued else f for f in schema.sparse)
    save(changed, dataclasses.replace(schema, sparse=wrong))
    with pytest.raises(UserError, match=r"schema\.json: pooling_factor of l is 1\.5, but the training split has 2\.0"):
        check(changed)


def test_memory_does_not_grow_with_a_hashed_table(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text("y,x\n" + "".join(f"{i % 2},{i}\n" for i in range(100)))
    hashed = {"column": "x", "encoding": "hash", "num_embeddings": 50_000_000}
    description = {"format": "csv", "label": {"column": "y"}, "sparse": [hashed]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(description))
    prepare(load_table(tmp_path / "table.yaml"), [tmp_path / "raw.csv"], tmp_path / "out")
    tracemalloc.start()
    try:
        check(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
