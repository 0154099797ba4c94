"""`mlet prepare` from and to an object store."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.prepare import raw_blocks
from mlet_dist.data.prepare.pipeline import PASSES, prepare
from mlet_dist.data.prepare.raw_formats import criteo
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import FILE_NAME
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes
from tests.helpers.s3_server import S3Bucket

Write = Callable[..., Path]

LINES = make_raw_lines(120)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def stored(s3: S3Bucket, url: str) -> dict[str, bytes]:
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): s3.files.cat_file(path) for path in s3.files.find(root)}


def without_paths(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out the manifest, which names the raw files."""
    return {name: content for name, content in files.items() if name != "manifest.json"}


@pytest.fixture
def raw_urls(s3: S3Bucket, write_raw: Write) -> list[str]:
    """The same raw files as ``write_raw`` writes them, one of them compressed, as objects."""
    write_raw(raw_bytes(LINES[:70]), "a.tsv")
    write_raw(raw_bytes(LINES[70:]), "b.tsv.gz")
    s3.files.pipe_file(f"{s3.url}/raw/a.tsv", raw_bytes(LINES[:70]))
    s3.files.pipe_file(f"{s3.url}/raw/b.tsv.gz", gzip.compress(raw_bytes(LINES[70:])))
    return [f"{s3.url}/raw/a.tsv", f"{s3.url}/raw/b.tsv.gz"]


@pytest.fixture
def expected(tmp_path: Path, raw_urls: list[str]) -> dict[str, bytes]:
    prepare(criteo(2), [tmp_path / "raw" / "a.tsv", tmp_path / "raw" / "b.tsv.gz"], tmp_path / "expected")
    return files_of(tmp_path / "expected")


@pytest.mark.parametrize("kind", ["none", "status", "cut", "slow"])
def test_from_a_store_that_fails_now_and_then(
    tmp_path: Path,
    s3: S3Bucket,
    raw_urls: list[str],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 3000)
    if kind != "none":
        s3.server.set_faults({"kind": kind, "status": 503, "seconds": 1, "count": 2, "path": "/raw/", "method": "GET"})
    prepare(criteo(2), raw_urls, tmp_path / "out")
    assert without_paths(files_of(tmp_path / "out")) == without_paths(expected)


def test_parquet_from_a_store(tmp_path: Path, s3: S3Bucket, write_raw: Write) -> None:
    description = write_raw(b"format: parquet\nlabel: {column: y}\nsparse: [{column: x}]\n", "table.yaml")
    table = pa.table({"y": [0, 1] * 50, "x": [str(index % 7) for index in range(100)]})
    pq.write_table(table, description.parent / "table.parquet", row_group_size=30)
    s3.files.put_file(str(description.parent / "table.parquet"), f"{s3.url}/table.parquet")
    prepare(load_table(description), [f"{s3.url}/table.parquet"], tmp_path / "out")
    prepare(load_table(description), [description.parent / "table.parquet"], tmp_path / "expected")
    assert without_paths(files_of(tmp_path / "out")) == without_paths(files_of(tmp_path / "expected"))


def test_from_a_store_that_fails_for_good(tmp_path: Path, s3: S3Bucket, raw_urls: list[str]) -> None:
    url = raw_urls[0]
    s3.server.set_faults({"kind": "status", "status": 500, "path": "/raw/a.tsv", "method": "GET"})
    with pytest.raises(UserError, match=f"^{re.escape(url)}: cannot be read: told to fail$"):
        prepare(criteo(2), raw_urls, tmp_path / "out")
    s3.server.set_faults()
    for wrong, why in (
        (f"{s3.url}/raw/c.tsv", "No such file or directory"),
        ("s3://no-such-bucket/a.tsv", "The specified bucket does not exist"),
    ):
        with pytest.raises(UserError, match=f"^{wrong}: cannot be read: {why}$"):
            prepare(criteo(2), [wrong], tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["raw"]


def test_to_a_store(
    tmp_path: Path, s3: S3Bucket, raw_urls: list[str], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    raw = [tmp_path / "raw" / "a.tsv", tmp_path / "raw" / "b.tsv.gz"]
    url = f"{s3.url}/data/criteo"
    prepare(criteo(2), raw, f"{url}/")
    assert stored(s3, url) == expected
    with pytest.raises(UserError, match=f"^{url}: exists and is not empty; name another directory or remove this one$"):
        prepare(criteo(2), raw, url)
    for name in PASSES:
        prepare(criteo(2), raw, f"{s3.url}/passes", only=name)
    assert stored(s3, f"{s3.url}/passes") == expected
    assert list((tmp_path / "here").iterdir()) == []


def test_to_a_store_that_fails_and_again(
    tmp_path: Path, s3: S3Bucket, raw_urls: list[str], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call uploads some files; the second prepares nothing and uploads the rest."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    raw, url = [tmp_path / "raw" / "a.tsv", tmp_path / "raw" / "b.tsv.gz"], f"{s3.url}/out"
    s3.server.set_faults({"kind": "status", "status": 500, "path": "/vocabulary/C9", "method": "PUT"})
    message = f"^{url}: cannot be written: told to fail \\(finished work is kept in .*; it is used again once"
    with pytest.raises(UserError, match=message):
        prepare(criteo(2), raw, url)
    assert FILE_NAME not in stored(s3, url)
    s3.server.set_faults()
    monkeypatch.setattr("mlet_dist.data.prepare.reading.parse_block", None)
    prepare(criteo(2), raw, url)
    assert stored(s3, url) == expected
    assert list((tmp_path / "here").iterdir()) == []


def test_killed_after_the_upload(
    tmp_path: Path, s3: S3Bucket, raw_urls: list[str], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    raw, url = [tmp_path / "raw" / "a.tsv", tmp_path / "raw" / "b.tsv.gz"], f"{s3.url}/out"
    s3.server.set_faults({"kind": "status", "status": 500, "path": ".mlet-writer", "method": "DELETE"})
    with pytest.raises(UserError, match="told to fail"):
        prepare(criteo(2), raw, url)
    s3.server.set_faults()
    prepare(criteo(2), raw, url)
    assert stored(s3, url) == expected
    assert list((tmp_path / "here").iterdir()) == []
