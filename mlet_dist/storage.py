"""Places that fsspec opens by URL, such as s3://: how they are opened, and what their errors become."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist.errors import UserError
from mlet_dist.urls import is_url

ATTEMPTS = 4  # of a request, each of which botocore repeats by itself, see _configure_s3
READ_TIMEOUT_S = 15
CONNECT_TIMEOUT_S = 10

_BOTOCORE_ATTEMPTS = 5
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}  # protocol -> package, extra of pyproject.toml
_TRANSIENT_CODES = {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted"}


def open_filesystem(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises:
        UserError: fsspec does not know the URL's protocol, or the package for it is not installed.
    """
    protocol = location.partition("://")[0] if is_url(location) else ""
    try:
        if protocol in _EXTRAS:
            _configure_s3()
        filesystem, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        if protocol not in _EXTRAS:
            raise UserError(f"{location}: cannot be opened: {error}") from None
        package, extra = _EXTRAS[protocol]
        raise UserError(
            f"{location}: needs the package {package} (the extra `{extra}`), which cannot be imported; install it"
        ) from None
    except ValueError as error:
        raise UserError(f"{location}: cannot be opened: {error}") from None
    return filesystem, path


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Return whether the files are those of this machine's file systems."""
    return isinstance(filesystem, LocalFileSystem)


def has_directories(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Return whether directories exist without files; s3fs's makedirs would create a bucket whose name is mistyped."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    return not protocols & {"s3", "s3a", "gs", "gcs", "abfs", "az"}


@contextmanager
def as_os_error() -> Iterator[None]:
    """Turn whatever a store raises into an OSError with a ``strerror``; those of HTTP, for example, are no OSErrors."""
    try:
        yield
    except (UnicodeDecodeError, UserError):
        raise
    except OSError as error:
        if error.strerror:
            raise
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
        code = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(kind, errno.EIO)
        raise kind(code, reason_of(error)) from error
    except Exception as error:
        raise OSError(errno.EIO, reason_of(error)) from error


@contextmanager
def as_user_error(location: str, doing: str = "read") -> Iterator[None]:
    """Turn what keeps a path or URL from being opened, read or listed into a UserError, "…: cannot be ``doing``: …"."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{location}: cannot be {doing}: {reason_of(error)}") from error
    except Exception as error:
        if not is_url(location):
            raise
        # Stores raise exceptions of their own, which need not be OSErrors.
        raise UserError(f"{location}: cannot be {doing}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return why a store could not do what it was asked for, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError) and not error.strerror:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):  # such as a refused connection
            return reason_of(cause)
        # fsspec's text is often only the path; that of S3 may be a sentence, such as on a bucket that does not exist.
        text = text if " " in text and "/" not in text else os.strerror(errno.ENOENT)
    return " ".join(text.split()) or type(error).__name__


@cache
def _configure_s3() -> None:
    """Set timeouts and attempts of s3fs, whose own do not repeat a request after an error of the server.

    botocore repeats a request after 0 to 1, 2, 4 and 8 seconds, and s3fs repeats all of that ``ATTEMPTS`` times: a
    store that cannot be reached ends a command after half a minute, one that never answers after 5 minutes. The
    environment's AWS_MAX_ATTEMPTS and FSSPEC_S3_CONFIG_KWARGS are respected.
    """
    import s3fs

    s3fs.S3FileSystem.retries = ATTEMPTS
    s3fs.S3FileSystem.connect_timeout, s3fs.S3FileSystem.read_timeout = CONNECT_TIMEOUT_S, READ_TIMEOUT_S
    s3fs.core.set_custom_error_handler(_is_transient)
    settings = fsspec.config.conf.setdefault("s3", {})
    settings.setdefault("use_listings_cache", False)  # other processes write, too
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries = {"mode": "standard", "total_max_attempts": _BOTOCORE_ATTEMPTS}
        settings.setdefault("config_kwargs", {}).setdefault("retries", retries)


def _is_transient(error: Any) -> bool:
    """Return whether a request to S3 may succeed when it is repeated."""
    from aiohttp import ClientConnectionError
    from botocore.exceptions import ClientError, ConnectionError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or error.response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    return isinstance(error, OSError | ConnectionError | ClientConnectionError) and not isinstance(
        error, FileNotFoundError | PermissionError
    )
