"""Finished pieces of work in sealed files, which tell when they were damaged or stand in another's place.

The seal is a CRC-32 of a file's bytes and of its name within the work directory. Arrow files end with it. Parquet
files become part of the data set as they are, so their seals stand in records. A record (JSON) contains its name and
the SHA-256 of its content.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import uuid4

import pyarrow as pa
from isal.isal_zlib import crc32  # the same values as zlib's, at ten times the speed

from mlet_dist.errors import UserError

_TRAILER = struct.Struct("<8sQI")  # magic, bytes before the trailer, CRC-32
_MAGIC = b"MLETSEAL"
_READ_BYTES = 1 << 20
_ATTEMPTS = 2  # to make a damaged piece again

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class DamagedPieceError(UserError):
    """A finished piece is missing or damaged, and must be made again."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: this finished piece {problem}")
        self.path, self.problem = path, problem

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes raise it
        return DamagedPieceError, (self.path, self.problem)


class Repairs:
    """Repeats work after the damaged pieces that it finds were made again."""

    def __init__(self) -> None:
        self._made_again: Counter[Path] = Counter()

    def run(self, action: Callable[[], Result], make_again: Callable[[Path], None]) -> Result:
        """Return what ``action`` returns.

        Args:
            make_again: makes a piece again; it may find the pieces that this one is made from damaged, too.

        Raises:
            UserError: a piece is damaged again soon after it was made again.
        """
        while True:
            try:
                return action()
            except DamagedPieceError as damage:
                path = damage.path
                self._made_again[path] += 1
                if self._made_again[path] > _ATTEMPTS:
                    raise UserError(f"{damage}, though it was made again {_ATTEMPTS} times; check the disk") from None
                _logger.warning("%s; it is made again", damage)
                self.run(partial(make_again, path), make_again)


@contextmanager
def new_sealed(path: Path) -> Iterator[IO[bytes]]:
    """Write a sealed file under a temporary name, and rename it to ``path`` when the context exits."""
    with temporary_for(path) as temporary, temporary.open("wb") as file:
        sink = _Sink(file)
        yield sink  # type: ignore[misc]
        file.write(_TRAILER.pack(_MAGIC, sink.size, _with_name(sink.sum, path)))


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to ``path`` when the context exits."""
    temporary = path.with_suffix(f".{uuid4().hex}.tmp")
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to ``path``, whatever is there."""
    if path.is_dir() and not path.is_symlink():  # no file can be renamed to it
        shutil.rmtree(path)
    temporary.rename(path)


def read_sealed(path: Path) -> pa.Buffer:
    """Return the content of a sealed file.

    Raises:
        DamagedPieceError: the file is missing or damaged.
    """
    with _damage(path):
        content = pa.py_buffer(path.read_bytes())
    size = max(0, content.size - _TRAILER.size)
    view = memoryview(content)
    _check_trailer(path, view[size:], size, crc32(view[:size]))
    return content.slice(0, size)


def check_sealed(path: Path) -> None:
    """Read a sealed file in constant memory; raise DamagedPieceError if it is missing or damaged."""
    with _damage(path), path.open("rb") as file:
        size = max(0, os.fstat(file.fileno()).st_size - _TRAILER.size)
        _check_trailer(path, file, size, _sum_of(file, size))


def map_sealed(path: Path) -> pa.Buffer:
    """Map the content of a sealed file into memory, which ``check_sealed`` has verified."""
    with pa.memory_map(str(path)) as source:
        return source.read_buffer(source.size() - _TRAILER.size)


def seal_of(path: Path, final: Path | None = None) -> str:
    """Return the seal of a file's bytes and name, ``bytes-crc32``; ``final`` is the name that the file will get."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return f"{size}-{_with_name(_sum_of(file, size), final or path):08x}"


def check_seals(seals: Sequence[tuple[Path, str]]) -> None:
    """Raise DamagedPieceError unless each file has its seal."""
    for path, seal in seals:
        with _damage(path):
            found = seal_of(path)
        if found != seal:
            raise DamagedPieceError(path, "has a wrong checksum")


def save_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal to a temporary file and rename it to ``path``."""
    record = {"name": _name(path), "content": content}
    with temporary_for(path) as temporary:
        text = json.dumps({"sha256": _digest(record), **record}, indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def load_record(path: Path) -> dict[str, Any] | None:
    """Return what ``save_record`` wrote, or None if the file does not exist.

    Raises:
        DamagedPieceError: the file is damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        with _damage(path):
            record = json.loads(path.read_bytes())
        if record.pop("sha256") != _digest(record) or record["name"] != _name(path):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedPieceError(path, "has a wrong checksum") from None
    content: dict[str, Any] = record["content"]
    return content


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class _Sink(io.RawIOBase):
    """A sequential writer that computes the CRC-32 of what it writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.sum = file, 0, 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sum = crc32(data, self.sum)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size


def _sum_of(file: IO[bytes], size: int) -> int:
    """Return the CRC-32 of the next ``size`` bytes."""
    found = 0
    while size > 0 and (block := file.read(min(size, _READ_BYTES))):
        found = crc32(block, found)
        size -= len(block)
    return found


def _check_trailer(path: Path, trailer: Any, size: int, found: int) -> None:
    content = bytes(trailer) if isinstance(trailer, memoryview) else trailer.read()
    if len(content) != _TRAILER.size or not content.startswith(_MAGIC):
        raise DamagedPieceError(path, "is cut short")
    _, expected_size, expected = _TRAILER.unpack(content)
    if size != expected_size or _with_name(found, path) != expected:
        raise DamagedPieceError(path, "has a wrong checksum")


def _with_name(checksum: int, path: Path) -> int:
    return crc32(_name(path).encode(errors="surrogateescape"), checksum)


def _name(path: Path) -> str:
    """Return the kind, the fingerprint and the name of a piece, which are the same wherever the work directory is."""
    return "/".join(path.parts[-3:])


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what cannot be read into DamagedPieceError; errors that are not the file's, as of memory, pass on."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
            raise DamagedPieceError(path, "is not a file")
        yield
    except FileNotFoundError:
        raise DamagedPieceError(path, "is missing") from None
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise
        raise DamagedPieceError(path, f"cannot be read: {error.strerror}") from None
