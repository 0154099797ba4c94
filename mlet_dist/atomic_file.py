"""Writes files atomically: under a temporary name, which is replaced when the content is complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def temporary_of(path: Path) -> Path:
    """Return the temporary name under which a file is written; a killed process leaves it behind."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file; sync it and rename it to ``path`` at the end, or remove it on an exception.

    A file that was at ``path`` stays until the new one is complete. Errors of the file system are raised as they are.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
