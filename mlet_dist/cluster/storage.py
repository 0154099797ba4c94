"""Whether storage can be written, and is the same for all who take part."""

import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist.errors import UserError

PREFIX = ".mlet-preflight-"
_SECONDS_TO_APPEAR = 10.0  # NFS clients look again after a while


@dataclass(frozen=True)
class Mark:
    """An empty file that somebody has put where a job will write.

    Attributes:
        setting: that names the place, e.g. ``run.dir``.
        place: as the setting has it.
        file: path or URL of the mark.
    """

    setting: str
    place: str
    file: str

    def remove(self) -> None:
        """Remove it; whatever hinders that."""
        with suppress(OSError):
            filesystem, path = fsspec.core.url_to_fs(self.file)
            filesystem.rm_file(path)


def put_mark(setting: str, place: str) -> Mark:
    """Write a mark into a directory, or into the nearest one above it that exists.

    Raises:
        UserError: it cannot be written.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(place)
        if isinstance(filesystem, LocalFileSystem):
            path = str(next(each for each in (Path(path), *Path(path).parents) if each.exists()))
        mark = Mark(setting, place, filesystem.unstrip_protocol(f"{path}/{PREFIX}{uuid.uuid4().hex}"))
        filesystem.pipe_file(f"{path}/{Path(mark.file).name}", b"")
    except (OSError, ValueError, ImportError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{setting} {place} cannot be written: {why}") from None
    return mark


def unseen(marks: Iterable[Mark]) -> list[Mark]:
    """Those of others' marks that do not appear here."""
    deadline, left = time.monotonic() + _SECONDS_TO_APPEAR, list(marks)
    while left := [mark for mark in left if not _exists(mark.file)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _exists(file: str) -> bool:
    with suppress(OSError):
        filesystem, path = fsspec.core.url_to_fs(file)
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))
    return False
