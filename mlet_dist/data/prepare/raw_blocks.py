"""Raw files, plain or gzip, local or remote, cut into blocks that workers parse side by side.

The blocks of a file are the same whoever reads it, so that finished ones can be kept. Those of a plain local file are
ranges of bytes, which a worker reads by itself; what is compressed or remote is read here, and handed over.
"""

import csv
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.prepare.raw_formats import TextFormat
from mlet_dist.errors import UserError

BLOCK_BYTES = 16 << 20

_GZIP_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class RawFile:
    """A raw file and what tells it from another of the same name.

    Attributes:
        path: local, or a URL that fsspec opens.
        size: in bytes.
        stamp: time of the last change, or what a remote store says in its place.
        columns: names of a line's fields in order, of this file's own header if it has one; or of a Parquet file.
    """

    path: str
    size: int
    stamp: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A number of whole lines, or a row group of a Parquet file.

    Attributes:
        path: of the file.
        index: position among the file's blocks.
        start, stop: range of the file's bytes; where ``data`` is not None, of its text's. Of Parquet: rows.
        data: the lines themselves, or None where they are to be read.
        aside: a file of its own that holds the lines, in place of ``data``; it goes when it is read.
    """

    path: str
    index: int
    start: int
    stop: int
    data: bytes | None = None
    aside: Path | None = None

    def put_aside(self, path: Path) -> "Block":
        """The same block with its lines in a file: another process gets them from there faster than through a pipe."""
        if self.data is None:
            return self
        path.write_bytes(self.data)
        return replace(self, data=None, aside=path)

    def read(self) -> bytes:
        """The lines, each with its line end, without a byte order mark.

        Raises:
            UserError: the file cannot be read.
        """
        data = self.data
        if self.aside is not None:
            data = self.aside.read_bytes()
            self.aside.unlink()
        if data is None:
            with _errors(self.path), open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
            if len(data) != self.stop - self.start:
                raise UserError(f"{self.path}: became shorter while it was read")
        if self.index == 0:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        return data if data.endswith(b"\n") else data + b"\n"


def examine(path: str, text: TextFormat | None, used: tuple[str, ...]) -> RawFile:
    """Look at a file before any is read: whether it can be opened and has the columns that are used.

    Raises:
        UserError: it cannot be opened, is empty, or lacks a column.
    """
    with _errors(path), _open(path) as file:
        size, stamp = _identity(path, file)
        if text is None:
            columns = _parquet_columns(path, file)
        elif text.header:
            columns = _header(path, file, text)
        else:
            columns = text.columns or ()
            _is_gzip(path, file)
        if text is None or text.header:
            for column in used:
                if columns.count(column) != 1:
                    problem = "has no column" if column not in columns else "has more than one column"
                    where = path if text is None else f"{path}: line 1: the header"
                    shown = ", ".join(columns)
                    raise UserError(f"{where} {problem} {column!r}; it has {shown:.300}")
        return RawFile(path, size, stamp, tuple(columns))


def text_blocks(raw: RawFile, read: Callable[[int], object]) -> Iterator[Block]:
    """Yield a text file's blocks; ``read`` is told how many of the file's bytes were passed since it was last called.

    Raises:
        UserError: the file cannot be read, is a truncated or corrupt .gz, or has a line of more than a block.
    """
    with _errors(raw.path), _open(raw.path) as file:
        if _is_gzip(raw.path, file) or not _is_local(raw.path):
            yield from _read_blocks(raw.path, file, read)
        else:
            yield from _ranges(raw, file, read)


def parquet_blocks(raw: RawFile, read: Callable[[int], object]) -> Iterator[Block]:
    """Yield a Parquet file's row groups as blocks."""
    with _errors(raw.path), _open(raw.path) as file:
        footer = pq.ParquetFile(file).metadata
    start = 0
    for group in range(footer.num_row_groups):
        stop = start + footer.row_group(group).num_rows
        yield Block(raw.path, group, start, stop)
        read(raw.size // footer.num_row_groups)
        start = stop


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read row groups from; UserError where it is broken."""
    with _errors(path), _open(path) as file:
        yield pq.ParquetFile(file)


def _read_blocks(path: str, raw: IO[bytes], read: Callable[[int], object]) -> Iterator[Block]:
    index, start, rest, position = 0, 0, b"", 0
    compressed = _is_gzip(path, raw)
    for chunk in _gunzipped(raw) if compressed else iter(lambda: raw.read(BLOCK_BYTES), b""):
        read(raw.tell() - position)
        position = raw.tell()
        end = chunk.rfind(b"\n") + 1
        if not end:
            rest += chunk
            if len(rest) > BLOCK_BYTES:
                raise _endless(path, start)
            continue
        data, rest = rest + chunk[:end], chunk[end:]
        yield Block(path, index, start, start + len(data), data)
        index, start = index + 1, start + len(data)
    if rest:
        yield Block(path, index, start, start + len(rest), rest)


def _gunzipped(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the text of a gzip file in pieces of ``BLOCK_BYTES``, whatever its members; checksums are verified.

    gzip.GzipFile reads in pieces so small that they cost a third more.
    """
    member, compressed = zlib.decompressobj(wbits=31), raw.read(_GZIP_BYTES)
    pieces: list[bytes] = []
    size = 0
    while compressed:
        pieces.append(member.decompress(compressed, BLOCK_BYTES - size))
        size += len(pieces[-1])
        if size == BLOCK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
        if member.eof:
            # Another member may follow, after zeros that fill up a block of a tape.
            compressed = member.unused_data.lstrip(b"\0")
            while not compressed and (following := raw.read(_GZIP_BYTES)):
                compressed = following.lstrip(b"\0")
            if compressed:
                member = zlib.decompressobj(wbits=31)
        else:
            compressed = member.unconsumed_tail or raw.read(_GZIP_BYTES)
    pieces.append(member.flush())  # what had no room when the last input was taken
    if not member.eof:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")
    if rest := b"".join(pieces):
        yield rest


def _ranges(raw: RawFile, file: IO[bytes], read: Callable[[int], object]) -> Iterator[Block]:
    index, start = 0, 0
    while start < raw.size:
        stop = min(start + BLOCK_BYTES, raw.size)
        if stop < raw.size:
            file.seek(stop - 1)
            rest = file.readline(BLOCK_BYTES)  # to the end of the line that the block's last byte is in
            stop += len(rest) - 1
            if len(rest) == BLOCK_BYTES and not rest.endswith(b"\n"):
                raise _endless(raw.path, start)
        yield Block(raw.path, index, start, stop)
        read(stop - start)
        index, start = index + 1, stop


def _endless(path: str, start: int) -> UserError:
    return UserError(f"{path}: after byte {start} is a line of more than {BLOCK_BYTES} bytes; text lines are expected")


def _is_local(path: str) -> bool:
    return "://" not in path


def _open(path: str) -> Any:
    return open(path, "rb") if _is_local(path) else fsspec.open(path, "rb").open()


def _identity(path: str, file: IO[bytes]) -> tuple[int, str]:
    if _is_local(path):
        status = os.fstat(file.fileno())
        return status.st_size, str(status.st_mtime_ns)
    filesystem, inner = fsspec.core.url_to_fs(path)
    info = filesystem.info(inner)
    stamps = (info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return int(info["size"]), str(next((stamp for stamp in stamps if stamp is not None), ""))


def _is_gzip(path: str, file: IO[bytes]) -> bool:
    file.seek(0)
    magic = file.read(len(_GZIP_MAGIC))
    file.seek(0)
    if not magic:
        raise UserError(f"{path}: is empty; raw data is expected")
    if magic != _GZIP_MAGIC and path.endswith(".gz"):
        raise UserError(f"{path}: is named .gz but is not gzip; rename it or compress it")
    return magic == _GZIP_MAGIC


def _header(path: str, file: IO[bytes], text: TextFormat) -> tuple[str, ...]:
    source = gzip.GzipFile(fileobj=file) if _is_gzip(path, file) else file
    line = source.readline(BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r\n")
    try:
        decoded = line.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: line 1: the header is not UTF-8 text") from None
    if text.quote is None:
        names = decoded.split(text.delimiter)
    else:
        try:
            names = next(csv.reader([decoded], delimiter=text.delimiter, quotechar=text.quote), [])
        except csv.Error as error:
            raise UserError(
                f"{path}: line 1: the header is {decoded!r:.80}, no line of column names: {error}"
            ) from None
    if text.columns is not None and tuple(names) != text.columns:
        raise UserError(
            f"{path}: line 1: the header is {decoded!r:.200} instead of {text.delimiter.join(text.columns)!r}"
        )
    return tuple(names)


def _parquet_columns(path: str, file: IO[bytes]) -> tuple[str, ...]:
    if path.endswith(_PARQUET_SUFFIXES) or file.read(4) == b"PAR1":
        file.seek(0)
        return tuple(pq.ParquetFile(file).schema_arrow.names)
    raise UserError(f"{path}: is not a Parquet file")


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What reading a file may raise becomes a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or corrupt gzip file: {error}") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a whole Parquet file: {str(error).partition(chr(10))[0]}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: No such file or directory") from error
    except (OSError, ImportError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read: {reason}") from error
