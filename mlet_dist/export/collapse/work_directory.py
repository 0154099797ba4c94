"""The work directory of an export, which keeps finished units so that an interrupted export can resume."""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.atomic_directory import check_free, swap_directories, sync_directory
from mlet_dist.atomic_file import replaced_file
from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.manifest import BLOCK_BYTES
from mlet_dist.checkpoint.writer import ChecksumStream
from mlet_dist.data.location import RemotePath, data_set_path
from mlet_dist.errors import UserError, os_error, print_warning
from mlet_dist.export.export_directory import MANIFEST
from mlet_dist.export.formats.tensor_shards import Format, TensorShard
from mlet_dist.formatting import load_json, to_json
from mlet_dist.remote_directory import RemoteDirectory

_JOB, _RECORDS, _EXPORT = "job.json", "records", "export"


class DiskFull(UserError):
    """A file cannot be written because the disk or the quota is full."""


@dataclass(frozen=True)
class WorkDirectory:
    """The files of the export ``out`` while it is written, and a record of each finished work unit.

    ::

        job.json          what the export is made from; a different job starts over
        records/          a JSON file per finished unit, written after the unit's files are synced to disk
        parts/            files that remain to be joined
        export/           the export, which is renamed to ``out`` at the end, or uploaded to ``remote``

    Args:
        out: an absolute path.
        remote: where the export is published in place of ``out``, which then only names the local work directory.
    """

    out: Path
    remote: RemoteDirectory | None = None

    @classmethod
    def of(cls, out: Path | str, run: Path) -> "WorkDirectory":
        """Return the work directory of an export; for a URL, it is beside ``run``, which all ranks share."""
        place = data_set_path(str(out))
        if isinstance(place, RemotePath):
            remote = RemoteDirectory(place.url)
            return cls(Path(os.path.realpath(run)).parent / remote.local_name, remote)
        if not place.parts:  # Path("") is Path(".")
            raise UserError("--out is empty or the current directory; name a directory that does not exist yet")
        return cls(Path(os.path.realpath(place)))

    def __str__(self) -> str:
        return str(self.remote or self.out)

    @property
    def root(self) -> Path:
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def export(self) -> Path:
        return self.root / _EXPORT

    @property
    def _claim(self) -> Path:
        return self.root / "claim"

    @property
    def _replaced(self) -> Path:
        return self.out.parent / f".{self.out.name}.replaced"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory if needed and lock it; remove it at the end if it contains no finished unit.

        Raises:
            UserError: another process has locked it, or it cannot be written.
        """
        with self.writing():
            missing = [parent for parent in self.out.parents if not parent.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another `mlet export` is writing the same export") from None
            try:
                yield
            finally:
                if self.root.exists() and not self.finished():
                    shutil.rmtree(self.root, ignore_errors=True)
                    for parent in missing:
                        with suppress(OSError):
                            parent.rmdir()
        finally:
            os.close(handle)

    def check_free(self, overwrite: bool) -> None:
        """Raise UserError if ``out`` exists, unless it is an export and ``overwrite`` is set."""
        if self.remote is not None:
            if overwrite:
                raise UserError(f"{self.remote}: --overwrite cannot replace an export at a URL; name another directory")
            self.remote.check_free(self._claim)
            return
        with self.writing():
            if self._replaced.exists() and not self.out.exists():  # killed between the two renames of `publish`
                self._replaced.rename(self.out)
            if (self.out / MANIFEST).exists():
                if not overwrite:
                    raise UserError(f"{self.out}: exists and is not empty; use --overwrite to replace it")
                with suppress(ValueError, AttributeError):
                    if {"format_version", "model"} <= load_json(self.out / MANIFEST).keys():
                        return
            check_free(self.out)

    def begin(self, job: Mapping[str, Any]) -> None:
        """Keep the finished units of an earlier call if it had the same job, and remove them otherwise; print which."""
        text = to_json(job, indent=1)
        with self.writing():
            path = self.root / _JOB
            before = path.read_text(encoding="utf-8") if path.exists() else None
            if before == text and self.export.is_dir():
                for left in self.root.rglob(".*.tmp"):
                    left.unlink()
                print(f"{self.root}: resuming from {len(self.finished())} finished units", file=sys.stderr)
                return
            if before is not None and before != text:
                reason = "removed: it was left by an export of another run or with other options"
                print_warning(f"{self.root}: {reason}")
            for left in self.root.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (self.root / _RECORDS).mkdir()
            self.export.mkdir()
            with self.new_file(_JOB) as stream:
                stream.write(text.encode())

    @contextmanager
    def new_file(self, name: str) -> Iterator[ChecksumStream]:
        """Write a file under a temporary name, sync it to disk and rename it to ``name`` when the context exits.

        Raises:
            UserError: it cannot be written.
        """
        path = self.root / name
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path) as file:
                yield ChecksumStream(file)

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Record that a unit is finished; its files must have been written."""
        with self.writing():
            for directory in {(self.root / file).parent for file in content["files"]}:
                sync_directory(directory)
            with self.new_file(f"{_RECORDS}/{name}.json") as stream:
                stream.write(to_json(content).encode())
            sync_directory(self.root / _RECORDS)

    def finished(self) -> set[str]:
        """Return the names of all records; none if ``job.json`` is missing, which says what they are records of."""
        with suppress(FileNotFoundError):
            (self.root / _JOB).stat()
            return {path.stem for path in (self.root / _RECORDS).iterdir() if path.suffix == ".json"}
        return set()

    def read_record(self, name: str) -> dict[str, Any]:
        """Read what ``record`` wrote.

        Raises:
            UserError: there is no such record, because a rank writes to storage that is not shared.
        """
        try:
            content: dict[str, Any] = load_json(self.root / _RECORDS / f"{name}.json")
        except FileNotFoundError:
            raise UserError(
                f"{self.root}: the record of {name} is missing; --out must be on storage that all ranks share"
            ) from None
        return content

    def publish(self) -> None:
        """Rename the export to ``out``, and remove the export that it replaces.

        If the file system can exchange two names, ``out`` is a complete export at every moment.
        """
        with self.writing():
            if self.remote is not None:
                self.remote.publish(self.export, MANIFEST, self._claim)
                shutil.rmtree(self.root)
                return
            sync_directory(self.export)
            shutil.rmtree(self._replaced, ignore_errors=True)
            # After a kill below, `export` may be the old export, from which a later call must not resume.
            (self.root / _JOB).unlink()
            if not self.out.exists():
                self.export.rename(self.out)
            elif not swap_directories(self.export, self.out):
                self.out.rename(self._replaced)
                self.export.rename(self.out)
            sync_directory(self.out.parent)
            shutil.rmtree(self._replaced, ignore_errors=True)
            shutil.rmtree(self.root)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of the file system into a UserError, and those of a full disk into DiskFull."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            cause = os_error(error)
            if cause is None:
                raise
            kind = DiskFull if cause.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(f"{self}: cannot be written: {cause.strerror or cause}") from None


def join_files(
    work: WorkDirectory,
    format: Format,
    directory: str,
    shards: Sequence[TensorShard],
    entries: Mapping[str, Mapping[str, Any]],
    target: str,
) -> tuple[list[TensorShard], dict[str, Any]]:
    """Copy shards, in the order of tensors and rows, to one new file, with one block in memory at a time.

    Args:
        directory: directory of the shards' files within ``work``.
        entries: ``bytes`` and ``crc32`` of the shards' files, by file name within ``work``.
        target: name of the new file within ``work``.

    Returns:
        The shards of the new file, and its ``bytes`` and ``crc32``.

    Raises:
        UserError: a file is damaged, or cannot be read or written.
    """
    shards = sorted(shards, key=lambda shard: (shard.name, shard.offsets))
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with work.new_file(target) as stream:
        joined = format.join(stream, Path(target).name, shards)
        for shard in shards:
            name = f"{directory}/{shard.file}"
            with _open_checked(work.root / name, entries[name]) as file:
                for start in range(0, shard.length, len(buffer)):
                    block = buffer[: shard.length - start]
                    file.read_into(shard.start + start, block)
                    stream.write(block)
    return joined, stream.checksum.entry()


@contextmanager
def _open_checked(path: Path, entry: Mapping[str, Any]) -> Iterator[CheckedFile]:
    with path.open("rb") as raw:
        file = CheckedFile(str(path), raw, entry)
        try:
            yield file
        finally:
            file.close()
