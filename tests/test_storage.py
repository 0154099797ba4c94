"""Opening stores by URL, requests that are repeated, and what the errors of stores become."""

import builtins
import errno
import socket
import time
from typing import Any

import pytest

from mlet_dist import storage
from mlet_dist.errors import UserError
from mlet_dist.storage import as_os_error, has_directories, open_filesystem, reason_of
from tests.helpers.s3_server import S3Bucket


def test_local_paths_and_unknown_protocols() -> None:
    filesystem, path = open_filesystem("/some/where")
    assert (path, storage.is_local(filesystem), has_directories(filesystem)) == ("/some/where", True, True)
    with pytest.raises(UserError, match=r"^nothing://x: cannot be opened: Protocol not known: nothing"):
        open_filesystem("nothing://x")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "s3fs":
            raise ImportError(name)
        return original(name, *args, **keywords)

    storage._configure_s3.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        open_filesystem("s3://bucket/data")
    assert str(caught.value) == (
        "s3://bucket/data: needs the package s3fs (the extra `s3`), which cannot be imported; install it"
    )


def _refused() -> FileNotFoundError:
    """What fsspec makes of a server that does not answer."""
    error = FileNotFoundError("http://localhost/x")
    error.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("one\n  two"), (OSError, errno.EIO, "one two")),
        (PermissionError("Forbidden"), (PermissionError, errno.EACCES, "Forbidden")),
        (FileNotFoundError("The bucket is gone"), (FileNotFoundError, errno.ENOENT, "The bucket is gone")),
        (FileNotFoundError("bucket/key"), (FileNotFoundError, errno.ENOENT, "No such file or directory")),
        (_refused(), (FileNotFoundError, errno.ENOENT, "Connection refused")),
        (TimeoutError(), (OSError, errno.EIO, "TimeoutError")),
        (OSError(errno.EBUSY, "busy"), (OSError, errno.EBUSY, "busy")),
    ],
)
def test_errors_have_a_reason(raised: Exception, expected: tuple[type, int, str]) -> None:
    with pytest.raises(OSError) as caught, as_os_error():  # noqa: PT011
        raise raised
    assert (type(caught.value), caught.value.errno, caught.value.strerror) == expected
    assert reason_of(caught.value) == expected[2]


def test_user_errors_pass_on() -> None:
    with pytest.raises(UserError, match="mine"), as_os_error():
        raise UserError("mine")


@pytest.mark.parametrize("status", [500, 503])
def test_requests_that_fail_are_repeated(s3: S3Bucket, status: int) -> None:
    path = f"{s3.url}/file"
    s3.files.pipe_file(path, b"content")
    for method in ("GET", "HEAD", "PUT"):
        s3.server.set_faults({"kind": "status", "status": status, "method": method, "count": 2, "path": "file"})
        s3.files.pipe_file(path, b"content")
        assert s3.files.info(path)["size"] == 7
        assert s3.files.cat_file(path) == b"content"


def test_an_answer_that_is_cut_off_is_requested_again(s3: S3Bucket) -> None:
    path, content = f"{s3.url}/file", bytes(range(256)) * 4000
    s3.files.pipe_file(path, content)
    s3.server.set_faults({"kind": "cut", "method": "GET", "count": 2, "path": "file"})
    with s3.files.open(path, "rb", cache_type="none") as file:
        assert file.read() == content


def test_an_answer_that_takes_too_long_is_requested_again(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3.files.pipe_file(f"{s3.url}/file", b"content")
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    impatient = s3fs.S3FileSystem(skip_instance_cache=True)
    s3.server.set_faults({"kind": "slow", "seconds": 60, "method": "GET", "count": 1, "path": "file"})
    started = time.monotonic()
    assert impatient.cat_file(f"{s3.url}/file") == b"content"
    assert time.monotonic() - started < 40


def test_requests_that_fail_for_good_end(s3: S3Bucket) -> None:
    s3.files.pipe_file(f"{s3.url}/file", b"content")
    s3.server.set_faults({"kind": "status", "status": 500, "path": "file"})
    with pytest.raises(OSError, match=r"told to fail|Internal Server Error"), as_os_error():
        s3.files.cat_file(f"{s3.url}/file")
    s3.server.set_faults({"kind": "status", "status": 403, "path": "file"})
    with pytest.raises(PermissionError, match="Forbidden"), as_os_error():
        s3.files.cat_file(f"{s3.url}/file")


def test_nobody_listens(s3: S3Bucket) -> None:
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # The port stays taken, so that no other process listens there.
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        nobody = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
        with pytest.raises(OSError, match="Could not connect to the endpoint URL"), as_os_error():
            nobody.cat_file(f"{s3.url}/file")


def test_object_stores_have_no_directories(s3: S3Bucket) -> None:
    assert not has_directories(s3.files)
