"""Where checkpoints lie: a directory, or a URL that fsspec opens."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist.atomic_directory import sync_directory
from mlet_dist.checkpoint.manifest import Manifest, ManifestError
from mlet_dist.errors import UserError

MANIFEST, INCOMPLETE = "manifest.json", ".incomplete"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: a directory or a URL (s3://…, gs://…); it need not exist yet.

    Raises:
        UserError: fsspec does not know the URL's kind, or lacks the package for it.
    """

    def __init__(self, location: Path | str) -> None:
        try:
            self.filesystem, self.root = fsspec.core.url_to_fs(str(location))
        except (ValueError, ImportError) as error:
            raise UserError(f"{location}: cannot be opened: {error}") from None
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self._location = str(location)

    def __str__(self) -> str:
        return self._location

    @property
    def place(self) -> tuple[str, str]:
        """What two stores share that are the same, by whatever path or URL they were opened."""
        return type(self.filesystem).__name__, os.path.realpath(self.root) if self.is_local else self.root

    def checkpoints(self) -> list["Checkpoint"]:
        """All that is there, whole or not, by step."""
        self.filesystem.invalidate_cache()
        try:
            paths = self.filesystem.ls(self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = (_NAME.fullmatch(path.rstrip("/").rpartition("/")[2]) for path in paths)
        return [self.checkpoint(step) for step in sorted(int(found[1]) for found in steps if found)]

    def checkpoint(self, step: int) -> "Checkpoint":
        """That of a step, which need not exist."""
        return Checkpoint(self, step)

    def free_bytes(self) -> int | None:
        """What may still be written; None where nobody knows."""
        if not self.is_local:
            return None
        path = Path(self.root)
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a store, by its files."""

    store: CheckpointStore
    step: int

    @classmethod
    def at(cls, location: str) -> "Checkpoint | None":
        """The checkpoint that a path or URL names by its last part, whether it exists or not; None if it names none."""
        parent, _, name = location.rstrip("/").rpartition("/")
        found = _NAME.fullmatch(name)
        return (
            None
            if found is None
            else cls(CheckpointStore(parent or ("." if "/" not in location else "/")), int(found[1]))
        )

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"step-{self.step:08d}"

    @property
    def path(self) -> str:
        """As the store's file system names it."""
        return f"{self.store.root.rstrip('/')}/{self.name}"

    @property
    def location(self) -> str:
        """A path, or the URL."""
        return self.path if self.store.is_local else str(self.store.filesystem.unstrip_protocol(self.path))

    def __str__(self) -> str:
        return self.location

    @property
    def is_being_written(self) -> bool:
        """Whether its writer, or whoever removed it, alive or dead, has not come to the end."""
        names = self._names()
        return MANIFEST not in names and (INCOMPLETE in names or not names)

    def manifest(self) -> Manifest:
        """What it says of itself; the files are not looked at.

        Raises:
            ManifestError: it is missing, damaged or of another step, so the checkpoint is not whole.
        """
        try:
            data = self.store.filesystem.cat_file(f"{self.path}/{MANIFEST}")
        except FileNotFoundError:
            raise ManifestError(f"{self}: {MANIFEST} is missing") from None
        except Exception as error:  # each store has errors of its own
            raise ManifestError(f"{self}: {MANIFEST} cannot be read: {error or type(error).__name__}") from None
        manifest = Manifest.parse(data, f"{self}: {MANIFEST}")
        if manifest.step != self.step:
            raise ManifestError(f"{self}: {MANIFEST} is that of step {manifest.step}: the directory was renamed")
        return manifest

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is there, by name."""
        found = self.store.filesystem.ls(self.path, detail=True)
        return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}

    def begin(self) -> None:
        """Take away what is there of this step, and mark what will be as not whole yet."""
        self.remove()
        self.store.filesystem.makedirs(self.path, exist_ok=True)
        self.store.filesystem.pipe_file(f"{self.path}/{INCOMPLETE}", b"")

    def finish(self, manifest: Manifest) -> None:
        """Mark it whole, in one instant; all files must be there."""
        target = f"{self.path}/{MANIFEST}"
        if self.store.is_local:
            with self.open_new(f"{MANIFEST}.tmp") as file:
                file.write(manifest.render())
            sync_directory(Path(self.path))
            os.replace(f"{target}.tmp", target)
            sync_directory(Path(self.path))
            sync_directory(Path(self.store.root))
        else:  # an object appears as a whole
            self.store.filesystem.pipe_file(target, manifest.render())
        self.store.filesystem.rm_file(f"{self.path}/{INCOMPLETE}")

    def remove(self) -> None:
        """Take it away: what marks it whole first, and the mark of what is not whole last.

        Whoever is killed meanwhile leaves something that looks neither whole nor damaged, and is removed later.
        """
        names = self._names()
        if MANIFEST in names:
            if INCOMPLETE not in names:
                self.store.filesystem.pipe_file(f"{self.path}/{INCOMPLETE}", b"")
            self.store.filesystem.rm(f"{self.path}/{MANIFEST}", recursive=True)
        if files := names - {MANIFEST, INCOMPLETE}:
            self.store.filesystem.rm([f"{self.path}/{name}" for name in sorted(files)], recursive=True)
        with suppress(FileNotFoundError):
            self.store.filesystem.rm(self.path, recursive=True)

    @contextmanager
    def open_new(self, name: str) -> Iterator[IO[bytes]]:
        """A new file of it, which is on the disk when the block ends."""
        with self.store.filesystem.open(f"{self.path}/{name}", "wb") as file:
            yield file
            if self.store.is_local:
                file.flush()
                os.fsync(file.fileno())

    def open(self, name: str) -> IO[bytes]:
        """A file of it, to be read from its beginning."""
        arguments: dict[str, Any] = {} if self.store.is_local else {"cache_type": "readahead"}
        return cast(IO[bytes], self.store.filesystem.open(f"{self.path}/{name}", "rb", **arguments))

    def _names(self) -> set[str]:
        self.store.filesystem.invalidate_cache(self.path)
        try:
            paths = self.store.filesystem.ls(self.path, detail=False)
        except FileNotFoundError:
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in paths}
