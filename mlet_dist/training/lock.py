"""A directory that one job has to itself."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlet_dist.errors import UserError


@contextmanager
def locked(file: Path, name: str) -> Iterator[None]:
    """Hold ``file``, made with its directory if need be, for as long as the block and its process last.

    Args:
        name: what the directory is called in messages.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read(500).strip() or "another one"
            raise UserError(f"{name}: another job is training into it ({holder}); choose another") from None
        except OSError as error:
            raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
        yield
