"""A file in the place of a part is refused at the start and by `--check`, also where it has the same shape."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.parquet_parts import write_parquet
from mlet_dist.data.prepare import chunks
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.data_set_parts import write_schema

DESCRIPTION = """
format: csv
label: {column: y}
dense: [{column: a, transform: raw}]
sparse: [{column: x, encoding: hash, num_embeddings: 50}]
split: {by: rows, shares: {train: 0.5, valid: 0.25, test: 0.25}}
"""
ROWS = 160
FIRST, SECOND = "train/part-00000.parquet", "train/part-00001.parquet"


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two data sets of several parts; their parts differ in the order of labels alone."""
    base = tmp_path_factory.mktemp("exchanged")
    (base / "table.yaml").write_text(DESCRIPTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "GROUP_ROWS", 40)
        patch.setattr("mlet_dist.data.prepare.raw_blocks.BLOCK_BYTES", 7 * 40)
        rng = np.random.default_rng(1)
        for name in ("one", "other"):
            labels = np.concatenate([rng.permutation([0, 1] * 20) for _ in range(4)])
            lines = [f"{label},{i % 8},v{i % 8}" for i, label in enumerate(labels)]
            (base / f"{name}.csv").write_text("\n".join(["y,a,x", *lines]) + "\n")
            prepare(load_table(base / "table.yaml"), [base / f"{name}.csv"], base / name)
    return base / "one", base / "other"


@pytest.fixture
def changed(data_sets: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return copies of the data sets that a test may change."""
    return (
        Path(shutil.copytree(data_sets[0], tmp_path / "one")),
        Path(shutil.copytree(data_sets[1], tmp_path / "other")),
    )


def open_splits(data: Path) -> None:
    for split in ("train", "valid", "test"):
        options = {"dense_features": None, "sparse_features": None}
        list(DataLoader(data, split, batch_size=8, rank=0, world_size=1, **options))


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_the_parts_have_the_same_shape(data_sets: tuple[Path, Path]) -> None:
    """So that nothing but the identity of their rows tells them apart."""
    schemas = [DatasetSchema.load(data) for data in data_sets]
    parts = [part for schema in schemas for each in schema.parts.values() for part in each]
    assert len({(part.rows, part.positives, part.bytes) for part in parts}) == 1
    assert len({part.pages_sha256 for part in parts}) == len(parts) == 8
    for data in data_sets:
        open_splits(data)
        check(data)


def both(message: str, data: Path) -> None:
    for read in (open_splits, check):
        with pytest.raises(UserError, match=message) as caught:
            read(data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [SECOND, "valid/part-00000.parquet", "test/part-00000.parquet"])
def test_parts_of_the_same_data_set(changed: tuple[Path, Path], other: str) -> None:
    data, _ = changed
    exchange(data / FIRST, data / other)
    both(f"{data / FIRST}: holds the rows of {other}; put each part back in its place", data)


def test_a_part_of_another_data_set(changed: tuple[Path, Path]) -> None:
    data, other = changed
    exchange(data / "valid/part-00000.parquet", other / "valid/part-00000.parquet")
    for each in changed:
        with pytest.raises(UserError, match=f"{each}/valid/part-00000.parquet: is not the file that schema.json descr"):
            open_splits(each)
        with pytest.raises(UserError, match=f"{each}/valid/part-00000.parquet: its SHA-256 is"):
            check(each)


def test_the_schema_of_another_data_set(changed: tuple[Path, Path]) -> None:
    data, other = changed
    shutil.copy(other / "schema.json", data / "schema.json")
    with pytest.raises(UserError, match=f"{data / FIRST}: is not the file that schema.json describes"):
        open_splits(data)
    with pytest.raises(UserError, match=f"{data}/schema.json: its SHA-256 is"):
        check(data)


def rewritten(path: Path) -> None:
    """The same rows, as another program writes them: their identity is lost with the footer."""
    pq.write_table(pq.read_table(path), path)


def reversed_rows(path: Path) -> None:
    table = pq.read_table(path)
    write_parquet(table.take(list(range(table.num_rows))[::-1]), path)


def longer(path: Path) -> None:
    """A file whose footer is that of the part, with bytes that belong to nothing before it."""
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    path.write_bytes(content[:-footer] + b"\0" * 9 + content[-footer:])


@pytest.mark.parametrize("change", [rewritten, reversed_rows, longer])
def test_a_file_that_was_written_again(changed: tuple[Path, Path], change: Callable[[Path], None]) -> None:
    data, _ = changed
    change(data / SECOND)
    with pytest.raises(UserError, match=f"{data / SECOND}: is not the file that schema.json describes"):
        open_splits(data)
    with pytest.raises(UserError, match=f"{data / SECOND}: "):
        check(data)


def test_parts_of_the_same_rows_may_be_exchanged(changed: tuple[Path, Path]) -> None:
    data, _ = changed
    shutil.copy(data / FIRST, data / "copy")
    shutil.move(data / "copy", data / FIRST)
    open_splits(data)
    check(data)


def test_a_schema_that_was_changed_is_refused(changed: tuple[Path, Path]) -> None:
    data, _ = changed
    whole = json.loads((data / "schema.json").read_text())
    for key, value in (
        ("malformed", 3),
        ("parts", whole["parts"] | {"train": whole["parts"]["train"][::-1]}),
        ("preprocessing", whole["preprocessing"] | {"label": {"column": "z"}}),
    ):
        (data / "schema.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(UserError, match=r"schema\.json: the SHA-256 of its content is [0-9a-f]{64} instead of"):
            DatasetSchema.load(data)
    write_schema(data, whole)
    open_splits(data)


def test_a_vocabulary_of_other_values_is_found_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(DESCRIPTION.replace(", encoding: hash, num_embeddings: 50", ""))
    (tmp_path / "raw.csv").write_text("y,a,x\n" + "".join(f"{i % 2},{i},v{i % 8}\n" for i in range(ROWS)))
    data = tmp_path / "data"
    prepare(load_table(tmp_path / "table.yaml"), [tmp_path / "raw.csv"], data)
    path = data / "vocabulary" / "x.parquet"
    table = pq.read_table(path)
    others = [f"w{index}" for index in range(table.num_rows)]
    sums = write_parquet(table.set_column(0, "value", [others]), path)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["vocabulary/x.parquet"] = {"bytes": sums.bytes, "sha256": sums.sha256}
    write_manifest(data, manifest)
    with pytest.raises(
        UserError, match=f"{path}: has other values, or in another order, than those that ids were given"
    ):
        check(data)


def write_manifest(data: Path, content: dict[str, object]) -> None:
    kept = (data / "schema.json").read_bytes()
    write_schema(data, content)  # which seals any object
    (data / "manifest.json").write_bytes((data / "schema.json").read_bytes())
    (data / "schema.json").write_bytes(kept)
