"""Writes directories atomically: under a temporary name, which is replaced when the directory is complete."""

import ctypes
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlet_dist.errors import UserError, print_warning

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` to fill; rename it to ``out`` at the end, or remove it on an exception.

    Missing parents are created, and removed again on an exception. Temporary siblings that a killed process left are
    removed; one that another process is still filling is kept, with a warning on stderr.

    Raises:
        UserError: ``out`` is the current directory, a file, a directory that is not empty or a mount point, or it
            cannot be written.
    """
    if not out.parts:  # Path("") is Path(".")
        raise UserError("out is empty or the current directory; name a directory that does not exist yet")
    if out.parts[0].endswith(":"):  # Path("s3://bucket") is Path("s3:/bucket")
        raise UserError(f"{out.parts[0]}//{'/'.join(out.parts[1:])}: is a URL, but must be a local directory")
    out = Path(os.path.realpath(out))
    # Beside `out`, not in the system's temporary folder: a rename is atomic only within one file system.
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        check_free(out)
        _remove_leftovers(out)
        temporary.mkdir(parents=True)
        with _locked(temporary):
            yield temporary
            temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise


def check_free(out: Path) -> None:
    """Raise UserError unless a directory can be renamed to ``out``, which must not exist or be an empty directory."""
    if not out.exists():
        if os.path.islink(os.path.realpath(out)):
            raise UserError(f"{out}: is a loop of symbolic links; name a directory that does not exist yet")
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory that does not exist yet")
    if os.path.ismount(out):
        raise UserError(f"{out}: is a mount point, to which no directory can be renamed; name a directory inside it")
    if any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty; name another directory or remove this one")


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap_directories(one: Path, other: Path) -> bool:
    """Swap the names of two directories atomically; return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory; raise OSError if another process has locked it. The lock ends with its process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Remove temporary siblings that no process has locked."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.{8 * '[0-9a-f]'}.tmp")):
        try:
            with _locked(path):
                shutil.rmtree(path)
        except OSError:
            print_warning(f"{path}: another process seems to be writing {out} now")
