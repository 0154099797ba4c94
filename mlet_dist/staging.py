"""All or nothing: a directory is filled under a temporary name and takes its real one when complete."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlet_dist.errors import UserError


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Give a temporary sibling of ``out`` to fill; rename it to ``out`` at the end, remove it on any exception.

    Missing parents are created, and removed again on an exception.

    Raises:
        UserError: ``out`` is a file, a directory that is not empty or a mount point, or it cannot be written.
    """
    out = Path(os.path.realpath(out))
    # Beside `out`, not in the system's temporary folder: a rename is atomic only within one file system.
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        _check_free(out)
        temporary.mkdir(parents=True)
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


def _check_free(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory that does not exist yet")
    if os.path.ismount(out):
        raise UserError(f"{out}: is a mount point, which nothing can be renamed to; name a directory inside it")
    if any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty; name another directory or remove this one")
