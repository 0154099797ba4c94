"""Where checkpoints are stored: a directory, or a URL that fsspec opens."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast
from uuid import uuid4

from mlet_dist.checkpoint.manifest import MANIFEST, Manifest, ManifestError
from mlet_dist.errors import UserError
from mlet_dist.regular_file import open_regular
from mlet_dist.storage import has_directories, is_local, open_filesystem, reason_of

INCOMPLETE = ".incomplete"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: a directory or a URL (s3://…, gs://…); it need not exist yet.

    Raises:
        UserError: fsspec does not know the URL's scheme, or the package for it is not installed.
    """

    def __init__(self, location: Path | str) -> None:
        self.filesystem, self.root = open_filesystem(str(location))
        self.is_local = is_local(self.filesystem)
        self._location = str(location)

    def __str__(self) -> str:
        return self._location

    @property
    def identity(self) -> tuple[str, str]:
        """A value that is equal for two stores in the same place, whatever path or URL they were opened by."""
        return type(self.filesystem).__name__, os.path.realpath(self.root) if self.is_local else self.root

    def checkpoints(self) -> list["Checkpoint"]:
        """All checkpoints in the store, complete or not, in the order of their steps."""
        self.filesystem.invalidate_cache()
        try:
            with self.reading():
                paths = self.filesystem.ls(self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = (_NAME.fullmatch(path.rstrip("/").rpartition("/")[2]) for path in paths)
        return [self.checkpoint(step) for step in sorted(int(found[1]) for found in steps if found)]

    def complete_checkpoints(self) -> Iterator[tuple["Checkpoint", Manifest]]:
        """Yield the checkpoints that have a valid manifest, and the manifest; another may be being written."""
        for checkpoint in self.checkpoints():
            try:
                manifest = checkpoint.manifest()
            except ManifestError:
                continue
            yield checkpoint, manifest

    def checkpoint(self, step: int) -> "Checkpoint":
        """Return the checkpoint of ``step``, which need not exist."""
        return Checkpoint(self, step)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn the errors of a store at a URL, but those of missing files, into a UserError that names it."""
        try:
            yield
        except NotADirectoryError:
            raise
        except FileNotFoundError as error:
            self.check_missing(error)
            raise
        except Exception as error:  # each fsspec implementation raises its own errors
            if self.is_local:
                raise
            raise UserError(f"{self}: cannot be read: {reason_of(error)}") from None

    def check_missing(self, error: FileNotFoundError) -> None:
        """Raise UserError if a store at a URL says more than that a file is missing, such as that its bucket is."""
        reason = reason_of(error)
        if not self.is_local and reason != os.strerror(errno.ENOENT):
            raise UserError(f"{self}: cannot be read: {reason}") from None

    def check_writable(self) -> None:
        """Write a file to a store at a URL and remove it, so that a wrong bucket is noticed before training.

        Raises:
            UserError: the store cannot be written.
        """
        probe = f"{self.root.rstrip('/')}/.mlet-writable-{uuid4().hex}"
        try:
            if has_directories(self.filesystem):
                self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(probe, b"")
            self.filesystem.rm_file(probe)
        except Exception as error:  # each fsspec implementation raises its own errors
            raise UserError(f"{self}: cannot be written: {reason_of(error)}") from None

    def free_bytes(self) -> int | None:
        """Return the free space of the file system in bytes; None for URLs."""
        if not self.is_local:
            return None
        path = Path(self.root)
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a store, which need not exist."""

    store: CheckpointStore
    step: int

    @classmethod
    def at(cls, location: str) -> "Checkpoint | None":
        """Return the checkpoint whose directory ``location`` is, by its name alone; None if the name is no step's."""
        parent, _, name = location.rstrip("/").rpartition("/")
        found = _NAME.fullmatch(name)
        return (
            None
            if found is None
            else cls(CheckpointStore(parent or ("." if "/" not in location else "/")), int(found[1]))
        )

    @property
    def name(self) -> str:
        """The name of the checkpoint's directory."""
        return f"step-{self.step:08d}"

    @property
    def path(self) -> str:
        """The directory's path in the store's file system."""
        return f"{self.store.root.rstrip('/')}/{self.name}"

    @property
    def location(self) -> str:
        """The directory's local path or URL."""
        return self.path if self.store.is_local else str(self.store.filesystem.unstrip_protocol(self.path))

    def __str__(self) -> str:
        return self.location

    @property
    def is_unfinished(self) -> bool:
        """Whether writing or removing the checkpoint has started and not finished; the process may still be at it."""
        names = self._names()
        return MANIFEST not in names and (INCOMPLETE in names or not names)

    def manifest(self) -> Manifest:
        """Read the manifest; the other files are not verified.

        Raises:
            ManifestError: it is missing, damaged or of another step, so the checkpoint is not complete.
            UserError: the store cannot be read, so that nothing is known of the checkpoint.
        """
        try:
            with self.open(MANIFEST) as file:
                data = file.read()
        except FileNotFoundError as error:
            self.store.check_missing(error)
            raise ManifestError(f"{self}: {MANIFEST} is missing") from None
        except Exception as error:  # each fsspec implementation raises its own errors
            if not self.store.is_local:  # an older checkpoint must not take its place
                raise UserError(f"{self}: {MANIFEST} cannot be read: {reason_of(error)}") from None
            raise ManifestError(f"{self}: {MANIFEST} cannot be read: {error or type(error).__name__}") from None
        manifest = Manifest.parse(data, f"{self}: {MANIFEST}")
        if manifest.step != self.step:
            raise ManifestError(f"{self}: {MANIFEST} is that of step {manifest.step}: the directory was renamed")
        return manifest

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each existing file, by name."""
        with self.store.reading():
            found = self.store.filesystem.ls(self.path, detail=True)
        return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}

    def begin(self) -> None:
        """Remove an existing checkpoint of this step, and mark the new one as incomplete."""
        self.remove()
        if has_directories(self.store.filesystem):
            self.store.filesystem.makedirs(self.path, exist_ok=True)
        self.store.filesystem.pipe_file(f"{self.path}/{INCOMPLETE}", b"")

    def finish(self, manifest: Manifest) -> None:
        """Complete the checkpoint by writing its manifest; all other files must have been written."""
        manifest.write(self.store.filesystem, self.path)
        self.store.filesystem.rm_file(f"{self.path}/{INCOMPLETE}")

    def remove(self) -> None:
        """Remove the checkpoint's files: the manifest first, the marker ``.incomplete`` last.

        If the process is killed in between, the rest counts as unfinished, not as damaged, and is removed later.
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
        """Open a new file of the checkpoint for writing; it is synced to disk when the context exits."""
        with self.store.filesystem.open(f"{self.path}/{name}", "wb") as file:
            yield file
            if self.store.is_local:
                file.flush()
                os.fsync(file.fileno())

    def open(self, name: str) -> IO[bytes]:
        """Open a file of the checkpoint for sequential reading."""
        path = f"{self.path}/{name}"
        if self.store.is_local:
            return open_regular(path)
        return cast(IO[bytes], self.store.filesystem.open(path, "rb", cache_type="readahead"))

    def _names(self) -> set[str]:
        self.store.filesystem.invalidate_cache(self.path)
        try:
            with self.store.reading():
                paths = self.store.filesystem.ls(self.path, detail=False)
        except FileNotFoundError:
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in paths}
