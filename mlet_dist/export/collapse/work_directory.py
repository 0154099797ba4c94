"""The directory in which an export keeps finished units, and where they are joined."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.atomic_directory import check_free, swap_directories, sync_directory
from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.manifest import BLOCK_BYTES
from mlet_dist.checkpoint.writer import SummedStream
from mlet_dist.errors import UserError, os_error
from mlet_dist.export.export_directory import MANIFEST
from mlet_dist.export.formats.pieces import Format, Piece
from mlet_dist.formatting import to_json

_JOB, _RECORDS, _EXPORT = "job.json", "records", "export"


class DiskFull(UserError):
    """There is no room for a file."""


@dataclass(frozen=True)
class WorkDirectory:
    """Files of the export ``out``, and a record of each piece of work that is finished.

    ::

        job.json          what the export is made from; another job begins anew
        records/          a JSON file for each piece of work, there once its files are on the disk
        parts/            files that are still to be joined
        export/           what will be the export

    Args:
        out: an absolute path.
    """

    out: Path

    @property
    def root(self) -> Path:
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def export(self) -> Path:
        return self.root / _EXPORT

    @property
    def _replaced(self) -> Path:
        return self.out.parent / f".{self.out.name}.replaced"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, which is made if it is not there; one that holds no finished work goes at the end.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        with self.writing():
            missing = [parent for parent in self.out.parents if not parent.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another `mlet export` is at work on the same export") from None
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
        """Raise UserError unless the export may take its name: nothing is there, or an export and ``overwrite``."""
        with self.writing():
            if self._replaced.exists() and not self.out.exists():  # killed between the two renames of `publish`
                self._replaced.rename(self.out)
            if (self.out / MANIFEST).exists():
                if not overwrite:
                    raise UserError(f"{self.out}: exists and is not empty; it is replaced with --overwrite alone")
                with suppress(ValueError, AttributeError):
                    if {"format_version", "model"} <= json.loads(
                        (self.out / MANIFEST).read_text(encoding="utf-8")
                    ).keys():
                        return
            check_free(self.out)

    def begin(self, job: Mapping[str, Any]) -> None:
        """Keep what is there if the same job left it, and drop it otherwise; say which."""
        text = to_json(job, indent=1)
        with self.writing():
            path = self.root / _JOB
            before = path.read_text(encoding="utf-8") if path.exists() else None
            if before == text and self.export.is_dir():
                for left in self.root.rglob(".*.tmp"):
                    left.unlink()
                print(f"{self.root}: going on from {len(self.finished())} finished pieces of work", file=sys.stderr)
                return
            if before is not None and before != text:
                said = "dropped: an export of another run, or in another way, was stopped there"
                print(f"mlet: warning: {self.root}: {said}", file=sys.stderr)
            for left in self.root.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (self.root / _RECORDS).mkdir()
            self.export.mkdir()
            with self.new_file(_JOB) as stream:
                stream.write(text.encode())

    @contextmanager
    def new_file(self, name: str) -> Iterator[SummedStream]:
        """A file below the directory that has its name once it is whole and on the disk.

        Raises:
            UserError: it cannot be written.
        """
        path = self.root / name
        temporary = path.with_name(f".{path.name}.tmp")
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    yield SummedStream(file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Note that a piece of work is finished; its files must be there."""
        with self.writing():
            for directory in {(self.root / file).parent for file in content["files"]}:
                sync_directory(directory)
            with self.new_file(f"{_RECORDS}/{name}.json") as stream:
                stream.write(to_json(content).encode())
            sync_directory(self.root / _RECORDS)

    def finished(self) -> set[str]:
        """The names of all records; none where nothing says what they are records of."""
        with suppress(FileNotFoundError):
            (self.root / _JOB).stat()
            return {path.stem for path in (self.root / _RECORDS).iterdir() if path.suffix == ".json"}
        return set()

    def recorded(self, name: str) -> dict[str, Any]:
        """What ``record`` noted.

        Raises:
            UserError: it is not there: some rank writes elsewhere.
        """
        try:
            content: dict[str, Any] = json.loads((self.root / _RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.root}: nothing says that {name} is finished; --out must be on storage that all ranks share"
            ) from None
        return content

    def publish(self) -> None:
        """Give the export its name; one that had it before goes.

        Where the file system can exchange two names, one of the two exports has the name at every moment.
        """
        with self.writing():
            sync_directory(self.export)
            shutil.rmtree(self._replaced, ignore_errors=True)
            # Killed below, this may hold the old export, from which nobody must go on.
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
        """Turn errors of the file system into a UserError; a full disk is said to be one."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            cause = os_error(error)
            if cause is None:
                raise
            kind = DiskFull if cause.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(f"{self.out}: cannot be written: {cause.strerror or cause}") from None


def join_files(
    work: WorkDirectory,
    form: Format,
    directory: str,
    pieces: Sequence[Piece],
    entries: Mapping[str, Mapping[str, Any]],
    whole: str,
) -> tuple[list[Piece], dict[str, Any]]:
    """Copy pieces of tensors, in order of tensors and rows, to one new file; a block is in memory at a time.

    Args:
        directory: that the pieces' files are in, within ``work``.
        entries: what was noted of each file when it was written, by its name within ``work``.
        whole: name of the new file within ``work``.

    Returns:
        The pieces that the new file consists of, and its ``bytes`` and ``crc32``.

    Raises:
        UserError: a file is damaged, or cannot be read or written.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.name, piece.offsets))
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with work.new_file(whole) as stream:
        joined = form.join(stream, Path(whole).name, pieces)
        for piece in pieces:
            name = f"{directory}/{piece.file}"
            with _opened(work.root / name, entries[name]) as file:
                for start in range(0, piece.length, len(buffer)):
                    block = buffer[: piece.length - start]
                    file.read_into(piece.start + start, block)
                    stream.write(block)
    return joined, stream.checksum.entry()


@contextmanager
def _opened(path: Path, entry: Mapping[str, Any]) -> Iterator[CheckedFile]:
    with path.open("rb") as raw:
        file = CheckedFile(str(path), raw, entry)
        try:
            yield file
        finally:
            file.close()
