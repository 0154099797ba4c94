"""The directory of a sweep, into which several processes, also on several nodes, may work at the same time."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlet_dist.errors import UserError, writing

_LOOK_AGAIN_SECONDS = 1.0


@contextmanager
def joined(out: Path, digest: str) -> Iterator[None]:
    """Work into a directory within the block, beside other processes with the same sweep.

    Args:
        out: the directory, which is created.
        digest: of what the sweep does.

    Raises:
        UserError: processes of another sweep work into the directory, or it cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / ".mlet-sweep").open("a+", encoding="utf-8")
    with handle:
        if _locked(handle, fcntl.LOCK_EX):
            with writing(out):
                handle.truncate(0)
                handle.write(f"{digest} process {os.getpid()} on {socket.gethostname()}\n")
                handle.flush()
        fcntl.flock(handle, fcntl.LOCK_SH)  # an exclusive lock becomes a shared one, beside those of others
        handle.seek(0)
        found, _, owner = handle.read(500).strip().partition(" ")
        if found != digest:
            raise UserError(
                f"--out {out}: another sweep works into it ({owner or 'unknown process'}), whose arms, seeds or "
                "settings are others; choose another directory, or wait until it has ended"
            )
        yield


@contextmanager
def exclusive(file: Path, wait: Callable[[float], None]) -> Iterator[None]:
    """Hold a lock within the block, beside other threads, processes and sweeps.

    Args:
        file: to lock, in a directory that exists.
        wait: sleeps for a number of seconds; what it raises ends the wait for the lock.
    """
    with writing(file):
        handle = file.open("a", encoding="utf-8")
    with handle:
        while not _locked(handle, fcntl.LOCK_EX):
            wait(_LOOK_AGAIN_SECONDS)
        yield


class Claims:
    """Which arms this process works on: another one that wants the same arm takes another, or waits.

    Claims end with the process at the latest.

    Args:
        path: a directory, for a file for each arm.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handles: dict[str, IO[str]] = {}

    def claim(self, name: str) -> bool:
        """Claim an arm by the name of its file; return whether no other process has claimed it."""
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            handle = (self._path / f".{name}.lock").open("a", encoding="utf-8")
        if not _locked(handle, fcntl.LOCK_EX):
            handle.close()
            return False
        self._handles[name] = handle
        return True

    def release(self, name: str) -> None:
        """End a claim."""
        self._handles.pop(name).close()


def _locked(handle: IO[str], kind: int) -> bool:
    """Lock a file, and return whether no other holder was in the way; UserError where files cannot be locked."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{handle.name}: cannot be locked: {error.strerror or error}; a sweep needs storage with locks (flock)"
        ) from None
    return True
