"""Where a data set lies: a local directory, or a URL that fsspec opens (s3://…, gs://…, https://…, memory://…)."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist.errors import UserError


@dataclass(frozen=True)
class RemotePath:
    """What readers of a data set use of a ``Path``, for a URL. Whatever goes wrong is an OSError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def is_dir(self) -> bool:
        """Whether it is known to be a directory; some stores have none."""
        with _as_os_error():
            filesystem, path = fsspec.core.url_to_fs(self.url)
            return bool(filesystem.isdir(path))

    def read_text(self, encoding: str) -> str:
        """The whole file."""
        with self.open(block_bytes=0) as file, _as_os_error():
            return file.read().decode(encoding)

    def open(self, block_bytes: int) -> IO[bytes]:
        """The file, of which at least ``block_bytes`` are fetched at a time; 0 fetches what is asked for."""
        with _as_os_error():
            filesystem, path = fsspec.core.url_to_fs(self.url)
            how = {"cache_type": "readahead", "block_size": block_bytes} if block_bytes else {"cache_type": "none"}
            return cast(IO[bytes], filesystem.open(path, "rb", **how))


DataPath = Path | RemotePath


def data_set_path(text: str) -> DataPath:
    """The data set at a path or URL.

    Raises:
        UserError: fsspec does not know the URL's kind, or lacks the package for it.
    """
    if "://" not in text:
        return Path(text)
    try:
        filesystem, path = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise UserError(f"{text}: cannot be opened: {error}") from None
    return Path(path) if isinstance(filesystem, LocalFileSystem) else RemotePath(text)


@contextmanager
def _as_os_error() -> Iterator[None]:
    # Each store has errors of its own; those of HTTP, for one, are no OSErrors.
    try:
        yield
    except (OSError, UnicodeDecodeError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, str(error) or type(error).__name__) from error
