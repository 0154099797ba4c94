"""Directories that are published at a URL: one writer, complete with the last file, and going on after a kill."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.errors import UserError
from mlet_dist.remote_directory import CLAIM, RemoteDirectory
from tests.helpers.s3_server import S3Bucket

FILES = {"a.bin": b"a" * 1000, "train/part-0.parquet": b"b" * 70, "train/part-1.parquet": b"", "last.json": b"{}"}


def write(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def stored(s3: S3Bucket, url: str) -> dict[str, bytes]:
    s3.files.invalidate_cache()
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): s3.files.cat_file(path) for path in s3.files.find(root)}


def test_publishing(s3: S3Bucket, tmp_path: Path) -> None:
    source, url, claim = write(tmp_path / "out"), f"{s3.url}/deep/out", tmp_path / "claim"
    remote = RemoteDirectory(f"{url}/")
    assert (str(remote), remote.name) == (url, "out")
    assert remote.check_free(claim) is False
    assert not remote.is_published(source, "last.json")
    remote.publish(source, "last.json", claim)
    assert stored(s3, url) == FILES
    assert remote.is_published(source, "last.json")
    assert not claim.exists()
    for _ in range(2):
        with pytest.raises(UserError, match=f"^{url}: exists and is not empty; name another directory or remove this"):
            remote.check_free(claim)
    with pytest.raises(UserError, match="exists and is not empty"):
        remote.publish(write(tmp_path / "other", {"last.json": b"other"}), "last.json", tmp_path / "claim2")
    assert stored(s3, url) == FILES


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://"])
def test_a_bucket_alone(url: str) -> None:
    with pytest.raises(UserError, match=f"^{url}: names no directory inside the store; use one such as"):
        RemoteDirectory(url)


@pytest.mark.parametrize("url", ["http://host/out", "https://host/out"])
def test_http_cannot_be_written(url: str) -> None:
    with pytest.raises(UserError, match=f"^{url}: cannot be written by HTTP; name a directory, or a URL such as s3://"):
        RemoteDirectory(url)


def test_a_bucket_that_does_not_exist(s3: S3Bucket, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^s3://no-bucket/out: cannot be read: The specified bucket does not exist$"):
        RemoteDirectory("s3://no-bucket/out").check_free(tmp_path / "claim")


def test_names_of_local_work_differ() -> None:
    names = {RemoteDirectory(f"s3://{bucket}/out").local_name for bucket in ("one", "two")}
    assert len(names) == 2
    assert all(name.startswith("out-") for name in names)


@pytest.mark.parametrize("failing", [CLAIM, "a.bin", "part-0.parquet", "last.json"])
def test_a_store_that_fails_and_going_on(s3: S3Bucket, tmp_path: Path, failing: str) -> None:
    source, url, claim = write(tmp_path / "out"), f"{s3.url}/out", tmp_path / "claim"
    remote = RemoteDirectory(url)
    s3.server.set_faults({"kind": "status", "status": 500, "method": "PUT", "path": failing})
    with pytest.raises(UserError, match=f"^{url}: cannot be written: told to fail$"):
        remote.publish(source, "last.json", claim)
    assert "last.json" not in stored(s3, url)
    s3.server.set_faults()
    if failing != CLAIM:
        with pytest.raises(UserError, match=f"^{url}: another process is writing there, or was killed while it did"):
            RemoteDirectory(url).check_free(tmp_path / "other")
    RemoteDirectory(url).publish(source, "last.json", claim)
    assert stored(s3, url) == FILES


def test_killed_between_the_last_file_and_the_end(s3: S3Bucket, tmp_path: Path) -> None:
    source, url, claim = write(tmp_path / "out"), f"{s3.url}/out", tmp_path / "claim"
    s3.server.set_faults({"kind": "status", "status": 403, "method": "DELETE"})
    with pytest.raises(UserError, match="told to fail"):
        RemoteDirectory(url).publish(source, "last.json", claim)
    s3.server.set_faults()
    RemoteDirectory(url).publish(source, "last.json", claim)
    assert stored(s3, url) == FILES


def test_two_writers_at_once(s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of one writer, another with other files begins: one of the two wins, and nothing is mixed."""
    other_files = {"last.json": b"other", "b.bin": b"2"}
    first, second = write(tmp_path / "one"), write(tmp_path / "two", other_files)
    create, owner, sizes = RemoteDirectory._create, RemoteDirectory._owner, RemoteDirectory._sizes

    for number in range(8):
        url, refused = f"{s3.url}/out-{number}", list[str]()
        steps = count()

        def interfere(
            method: Any, url: str = url, number: int = number, refused: list[str] = refused, steps: Any = steps
        ) -> Any:
            def run(self: RemoteDirectory, *args: Any) -> Any:
                if next(steps) == number:
                    with monkeypatch.context() as patch:
                        for name, each in (("_create", create), ("_owner", owner), ("_sizes", sizes)):
                            patch.setattr(RemoteDirectory, name, each)
                        try:
                            RemoteDirectory(url).publish(second, "last.json", tmp_path / f"second-{number}")
                        except UserError as error:
                            refused.append(str(error))
                return method(self, *args)

            return run

        with monkeypatch.context() as patch:
            for name, method in (("_create", create), ("_owner", owner), ("_sizes", sizes)):
                patch.setattr(RemoteDirectory, name, interfere(method))
            try:
                RemoteDirectory(url).publish(first, "last.json", tmp_path / f"first-{number}")
            except UserError as error:
                refused.append(str(error))
        found = stored(s3, url)
        assert found in (FILES, other_files), (number, refused)
        assert len(refused) == (number < next(steps)), (number, refused)
    assert number >= next(steps) - 1  # every step was tried


def test_a_thousand_files(s3: S3Bucket, tmp_path: Path) -> None:
    """More than one listing returns (1,000)."""
    files = {f"train/part-{index:05}": b"%d" % index for index in range(1100)} | {"last.json": b"{}"}
    source, url = write(tmp_path / "out", files), f"{s3.url}/out"
    RemoteDirectory(url).publish(source, "last.json", tmp_path / "claim")
    assert s3.files.find(url.removeprefix("s3://")).__len__() == 1101
    with pytest.raises(UserError, match="exists and is not empty"):
        RemoteDirectory(url).check_free(tmp_path / "claim")
    RemoteDirectory(f"{s3.url}/ou").check_free(tmp_path / "claim")  # a prefix of the name is another directory
