"""Opens regular files only, and refuses at once what would keep a reader waiting: FIFOs, sockets, devices."""

import errno
import os
import stat
from pathlib import Path
from typing import IO

MAX_BYTES = 256 << 20
"""No config, description or manifest is larger; a file of a terabyte given by mistake would fill the memory."""

_READ_BYTES = 1 << 20

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular_file(path: Path | str, at_most: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file or has more than ``at_most`` bytes; ``strerror`` says which.
    """
    with open_regular(path) as file:
        # Not `at_most` bytes at once, for which a buffer of that size would be allocated.
        pieces, size = [], 0
        while size <= at_most and (piece := file.read(_READ_BYTES)):
            pieces.append(piece)
            size += len(piece)
    content = b"".join(pieces)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes, so that it is not what is expected", str(path))
    return content


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    try:
        _check_kind(os.stat(path), path)
        # Between the two calls the file may have been replaced by a FIFO, whose opening would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"its name cannot be a file's: {error}", str(path)) from None
    file = open(handle, "rb")  # noqa: SIM115  # the caller closes it
    try:
        _check_kind(os.fstat(handle), path)
    except OSError:
        file.close()
        raise
    return file


def special_kind(mode: int) -> str | None:
    """Return what a file is that is neither regular nor a directory, by its ``st_mode``; None for those two."""
    return _KINDS.get(stat.S_IFMT(mode))


def _check_kind(found: os.stat_result, path: Path | str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = special_kind(found.st_mode) or "no file"
        raise OSError(errno.EINVAL, f"it is {kind}, and must be a regular file", str(path))
