"""The location of a data set: a local directory, or a URL that fsspec opens (s3://…, gs://…, https://…, memory://…)."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from mlet_dist.storage import as_os_error, is_local, open_filesystem
from mlet_dist.urls import is_url


@dataclass(frozen=True)
class RemotePath:
    """The part of ``Path``'s interface that readers of a data set need, for a URL. Every failure raises an OSError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def is_dir(self) -> bool:
        """Return whether the store reports a directory here; object stores may have no directories."""
        with as_os_error():
            filesystem, path = open_filesystem(self.url)
            return bool(filesystem.isdir(path))

    def read_text(self, encoding: str) -> str:
        """Return the content of the file."""
        with as_os_error():
            filesystem, path = open_filesystem(self.url)
            return bytes(filesystem.cat_file(path)).decode(encoding)

    def open(self, block_bytes: int) -> IO[bytes]:
        """Open the file for reading in requests of at least ``block_bytes``; 0 requests exactly what is read."""
        with as_os_error():
            filesystem, path = open_filesystem(self.url)
            cache = {"cache_type": "readahead", "block_size": block_bytes} if block_bytes else {"cache_type": "none"}
            return cast(IO[bytes], filesystem.open(path, "rb", **cache))


DataPath = Path | RemotePath


def data_set_path(text: str) -> DataPath:
    """Return the location that a path or URL names; a file:// URL becomes a local path.

    Raises:
        UserError: fsspec does not know the URL's protocol, or the package for it is not installed.
    """
    if not is_url(text):
        return Path(text)
    filesystem, path = open_filesystem(text)
    return Path(path) if is_local(filesystem) else RemotePath(text)
