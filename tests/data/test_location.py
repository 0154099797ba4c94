"""Tests of mlet_dist.data.location, and of the loader on remote data sets."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.location import RemotePath, data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.mixed_dataset import GROUP_ROWS, PART_ROWS, write_mixed
from tests.helpers.s3_server import S3Bucket


class LostConnection(Exception):
    """An error like those of HTTP clients, which are not OSErrors."""


class RangeFile(AbstractBufferedFile):
    """A file that requests ranges of bytes from its file system, as files of object stores do."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        RangeFileSystem.requests.append((self.path, start, end))
        if self.path.endswith(RangeFileSystem.unreachable):
            raise LostConnection("connection down")
        return bytes(self.fs.cat_file(self.path, start, end))


class RangeFileSystem(MemoryFileSystem):
    """The files of memory://, read by requests that are recorded."""

    protocol = "range"
    requests: ClassVar[list[tuple[str, int, int]]] = []
    unreachable: ClassVar[str] = "nothing"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("range://", "memory://")))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **keywords: Any) -> Any:
        if keywords.get("cache_type") is None:  # a call by cat_file
            return super()._open(path, mode)
        return RangeFile(self, path, mode, block_size or 1, cache_type=keywords["cache_type"])


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    """Write one data set to memory://store/data and to ``tmp_path / "data"``; return its URL."""
    write_mixed(tmp_path / "data", 1003)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path / "data"), "/store/data", recursive=True)
    yield "memory://store/data"
    filesystem.rm("/store", recursive=True)


def load(path: Path, **changes: Any) -> list[list[float]]:
    arguments: dict[str, Any] = {
        "batch_size": 24,
        "rank": 1,
        "world_size": 2,
        "dense_features": None,
        "sparse_features": None,
    }
    batches = DataLoader(path, "train", **(arguments | changes))
    return [[*batch.dense.flatten().tolist(), *batch.sparse.weights().tolist()] for batch in batches]


@pytest.mark.parametrize("shuffle", [None, Shuffle(0, 200)])
def test_a_remote_data_set_gives_the_same_batches(remote: str, tmp_path: Path, shuffle: Shuffle | None) -> None:
    path = data_set_path(remote)
    assert DatasetSchema.load(path) == DatasetSchema.load(tmp_path / "data")
    assert load(path, shuffle=shuffle) == load(tmp_path / "data", shuffle=shuffle)


def test_a_local_url_is_a_path(tmp_path: Path) -> None:
    assert data_set_path(f"file://{tmp_path}/data") == tmp_path / "data"
    assert data_set_path("some/data") == Path("some/data")


def test_parts_of_a_url_are_urls() -> None:
    assert (
        str(RemotePath("s3://bucket/data/") / "train/part-00000.parquet") == "s3://bucket/data/train/part-00000.parquet"
    )


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"^nothing://x/y: cannot be opened: Protocol not known: nothing"):
        data_set_path("nothing://x/y")


def test_a_missing_remote_data_set_is_named(remote: str) -> None:
    with pytest.raises(UserError, match=r"memory://store/other: no such data set"):
        load(data_set_path("memory://store/other"))
    with pytest.raises(UserError, match=r"memory://store/data/train: no schema\.json in it"):
        load(data_set_path("memory://store/data/train"))


def test_a_damaged_remote_part_is_named(remote: str) -> None:
    part = f"{remote}/train/part-00002.parquet"
    content = fsspec.filesystem("memory").cat(part)
    fsspec.filesystem("memory").pipe(part, content[:-100])
    with pytest.raises(UserError, match=re.escape(f"{part}: not a complete Parquet file")):
        load(data_set_path(remote))
    fsspec.filesystem("memory").rm(part)
    with pytest.raises(UserError, match=re.escape(f"{part}: missing, though")):
        load(data_set_path(remote))


def test_a_stores_own_errors_name_the_file(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("range", RangeFileSystem, clobber=True)
    monkeypatch.setattr(RangeFileSystem, "unreachable", "part-00001.parquet")
    path = data_set_path(remote.replace("memory", "range"))
    with pytest.raises(UserError, match=r"^range://store/data/train/part-00001\.parquet: not .*: connection down$"):
        load(path)


def test_a_row_group_is_one_request(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("range", RangeFileSystem, clobber=True)
    monkeypatch.setattr(RangeFileSystem, "requests", [])
    loader = DataLoader(
        data_set_path(remote.replace("memory", "range")),
        "train",
        batch_size=24,
        rank=0,
        world_size=1,
        dense_features=None,
        sparse_features=None,
    )
    before = len(RangeFileSystem.requests)
    for _ in loader:
        pass
    groups = sum(-(-min(PART_ROWS, 1003 - start) // GROUP_ROWS) for start in range(0, 1003, PART_ROWS))
    assert len(RangeFileSystem.requests) - before == groups


class TestS3:
    """Data sets on a server of the S3 protocol."""

    @pytest.fixture
    def url(self, s3: S3Bucket, tmp_path: Path) -> str:
        write_mixed(tmp_path / "data", 1003)
        s3.files.put(str(tmp_path / "data"), f"{s3.url}/data", recursive=True)
        return f"{s3.url}/data"

    @pytest.mark.parametrize("kind", ["none", "status", "cut", "slow"])
    def test_the_same_batches(self, url: str, s3: S3Bucket, tmp_path: Path, kind: str) -> None:
        if kind != "none":
            s3.server.set_faults({"kind": kind, "status": 500, "seconds": 0.5, "count": 3, "path": "part-"})
        path = data_set_path(url)
        assert DatasetSchema.load(path) == DatasetSchema.load(tmp_path / "data")
        assert load(path, shuffle=Shuffle(0, 200)) == load(tmp_path / "data", shuffle=Shuffle(0, 200))

    def test_what_is_missing_is_named(self, url: str, s3: S3Bucket) -> None:
        with pytest.raises(UserError, match=f"^{s3.url}/other: no such data set; run `mlet prepare` to make one"):
            load(data_set_path(f"{s3.url}/other"))
        with pytest.raises(
            UserError, match=r"bucket/data: no such data set \(The specified bucket does not exist\); run"
        ):
            load(data_set_path("s3://no-such-bucket/data"))
        s3.files.rm_file(f"{url}/train/part-00001.parquet")
        with pytest.raises(UserError, match=f"^{url}/train/part-00001.parquet: missing, though"):
            load(data_set_path(url))

    @pytest.mark.parametrize(
        ("status", "reason"), [(500, "told to fail|Internal Server Error|Told"), (403, "Forbidden")]
    )
    def test_a_store_that_fails_for_good(self, url: str, s3: S3Bucket, status: int, reason: str) -> None:
        fault = {"kind": "status", "status": status}
        s3.server.set_faults(fault | {"path": "schema.json"})
        with pytest.raises(UserError, match=f"^{url}/schema.json: cannot be read: (told to fail|{reason})$"):
            load(data_set_path(url))
        s3.server.set_faults(fault | {"path": "part-00002"})
        message = f"^{url}/train/part-00002.parquet: not a complete Parquet file: .*({reason})$"
        with pytest.raises(UserError, match=message):
            load(data_set_path(url))
