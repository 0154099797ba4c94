"""The work directory beside an unfinished data set, which keeps the finished results of each pass.

Results lie under the fingerprint of what they depend on (module ``fingerprints``), so that a result for other arguments
or files is never mistaken for them. Files are written under a temporary name and renamed when they are complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlet_dist.data.prepare.sealed_files import temporary_for
from mlet_dist.errors import UserError


class WorkDirectory:
    """The work directory ``.<name>.prepare`` beside the data set ``out``, an absolute path."""

    def __init__(self, out: Path) -> None:
        self.root = out.parent / f".{out.name}.prepare"
        self._removed = self.root.with_name(f"{self.root.name}.removed")

    def path(self, kind: str, fingerprint: str) -> Path:
        """Return the directory of a kind of results with this fingerprint."""
        return self.root / kind / fingerprint

    @contextmanager
    def locked(self, shared: bool) -> Iterator[None]:
        """Create the directory if it does not exist, and lock it; ``shared`` lets other shards lock it, too.

        Raises:
            UserError: another process has locked it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.root}: another `mlet prepare` is running for this data set; wait until it has finished"
                ) from None
            yield
        finally:
            os.close(handle)

    def remove_stale(self, kept_fingerprints: Mapping[str, Collection[str]]) -> None:
        """Remove results for other arguments or other states of the files; keep those with the given fingerprints."""
        for kind, kept in kept_fingerprints.items():
            if (self.root / kind).is_dir():
                for path in (self.root / kind).iterdir():
                    if path.name not in kept:
                        shutil.rmtree(path, ignore_errors=True)  # shards that start together race for this

    def has_finished_files(self) -> bool:
        """Return whether at least one raw file need not be read again."""
        return any(self.root.glob("read/*/done.json"))

    def has_finished_blocks(self) -> bool:
        """Return whether at least one block of a raw file need not be read again."""
        return any(self.root.glob("read/*/*.arrow"))

    def remove(self) -> None:
        """Remove the directory. It is renamed first, so that a killed removal leaves no partial results."""
        self.remove_leftovers()
        with suppress(FileNotFoundError):
            self.root.rename(self._removed)
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what a killed removal has left."""
        shutil.rmtree(self._removed, ignore_errors=True)


def save_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary file and rename it to ``path``."""
    with temporary_for(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
