"""The directory beside a data set in the making, where finished pieces of work are kept until all are done.

Pieces of a kind lie under a digest of what they were made from (``keys.py``), so that nothing made from something else
can be taken for them. A file is there when it is whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from mlet_dist.errors import UserError


class WorkDirectory:
    """Pieces of work for the data set ``out``, an absolute path, in ``.<name>.prepare`` beside it."""

    def __init__(self, out: Path) -> None:
        self.root = out.parent / f".{out.name}.prepare"
        self._removed = self.root.with_name(f"{self.root.name}.removed")

    def of(self, kind: str, key: str) -> Path:
        """The directory of the pieces of a kind that were made from what ``key`` says."""
        return self.root / kind / key

    @contextmanager
    def locked(self, shared: bool) -> Iterator[None]:
        """Hold the directory, which is made if it is not there; other shards may hold it too where ``shared``.

        Raises:
            UserError: another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another `mlet prepare` is at work on the same data set") from None
            yield
        finally:
            os.close(handle)

    def drop_stale(self, keys: Mapping[str, Collection[str]]) -> None:
        """Remove what other arguments or another state of the files have left; ``keys`` are those to keep, by kind."""
        for kind, kept in keys.items():
            if (self.root / kind).is_dir():
                for path in (self.root / kind).iterdir():
                    if path.name not in kept:
                        shutil.rmtree(path, ignore_errors=True)  # shards that start together all do this

    def finished(self, whole_files: bool) -> bool:
        """Whether a raw file, or where not ``whole_files`` at least a block of one, need not be read again."""
        return any(self.root.glob("read/*/done.json" if whole_files else "read/*/*.arrow"))

    def remove(self) -> None:
        """Remove it with all that is in it; a removal that is killed leaves nothing under its name to go on from."""
        self.drop_removed()
        with suppress(FileNotFoundError):
            self.root.rename(self._removed)
        self.drop_removed()

    def drop_removed(self) -> None:
        """Remove what a removal that was killed has left."""
        shutil.rmtree(self._removed, ignore_errors=True)


def save_json(path: Path, content: Any) -> None:
    """Write JSON; the file is there when it is whole."""
    temporary = path.with_suffix(f".{uuid4().hex}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def load_json(path: Path) -> Any:
    """What ``save_json`` wrote; None where there is nothing."""
    with suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
