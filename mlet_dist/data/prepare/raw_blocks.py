"""Raw files (plain or gzip text, or Parquet; local or remote), cut into blocks that workers parse in parallel.

How a file is cut depends on nothing but the file, so that finished blocks can be kept. Blocks of a plain local file are
byte ranges, which the workers read themselves; compressed or remote text is read here and passed to the workers.
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

_GZIP_BYTES = 1 << 20  # compressed bytes to read at a time
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class RawFile:
    """A raw file, with what identifies its current content.

    Attributes:
        path: local path, or a URL that fsspec opens.
        size: size in bytes.
        stamp: time of the last change, or the ETag or time that a remote store reports.
        columns: names of the fields of a line in order (from the file's header, if it has one), or of a Parquet file's
            columns.
    """

    path: str
    size: int
    stamp: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Some complete lines of a text file, or a row group of a Parquet file.

    Attributes:
        path: path of the raw file.
        index: number of the block in the file.
        start, stop: range of the file's bytes, or of its decompressed text's if ``data`` is given; for Parquet, of its
            rows.
        data: the lines, or None if they are still to be read.
        spill_file: a temporary file with the lines, in place of ``data``; reading removes it.
    """

    path: str
    index: int
    start: int
    stop: int
    data: bytes | None = None
    spill_file: Path | None = None

    def spill(self, path: Path) -> "Block":
        """Move ``data`` to a file, from which another process gets it faster than through a pipe."""
        if self.data is None:
            return self
        path.write_bytes(self.data)
        return replace(self, data=None, spill_file=path)

    def read(self) -> bytes:
        """Return the lines, each with its line end, without a byte order mark.

        Raises:
            UserError: the file cannot be read.
        """
        data = self.data
        if self.spill_file is not None:
            data = self.spill_file.read_bytes()
            self.spill_file.unlink()
        if data is None:
            with _user_errors(self.path), open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
            if len(data) != self.stop - self.start:
                raise UserError(f"{self.path}: became shorter while it was read; run again once it is complete")
        if self.index == 0:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        return data if data.endswith(b"\n") else data + b"\n"


def inspect_file(path: str, text: TextFormat | None, used: tuple[str, ...]) -> RawFile:
    """Check that a file can be opened and has the ``used`` columns, without reading it.

    Raises:
        UserError: the file cannot be opened, is empty, or lacks a column.
    """
    with _user_errors(path), _open(path) as file:
        size, stamp = _size_and_stamp(path, file)
        if text is None:
            columns = _parquet_columns(path, file)
        elif text.header:
            columns = _header(path, file, text)
        else:
            columns = text.columns or ()
            _is_gzip(path, file)  # raises if the file is empty or misnamed
        if text is None or text.header:
            for column in used:
                if columns.count(column) != 1:
                    problem = "has no column" if column not in columns else "has more than one column"
                    where = path if text is None else f"{path}: line 1: the header"
                    shown = ", ".join(columns)
                    raise UserError(f"{where} {problem} {column!r}; it has {shown:.300}")
        return RawFile(path, size, stamp, tuple(columns))


def text_blocks(raw: RawFile, on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the blocks of a text file; ``on_read`` is called with the number of bytes of each step.

    Raises:
        UserError: the file cannot be read, is a truncated or corrupt .gz, or has a line longer than a block.
    """
    with _user_errors(raw.path), _open(raw.path) as file:
        if _is_gzip(raw.path, file) or not _is_local(raw.path):
            yield from _read_blocks(raw.path, file, on_read)
        else:
            yield from _ranges(raw, file, on_read)


def parquet_blocks(raw: RawFile, on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the row groups of a Parquet file as blocks; ``on_read`` as in ``text_blocks``."""
    with _user_errors(raw.path), _open(raw.path) as file:
        footer = pq.ParquetFile(file).metadata
    start = 0
    for group in range(footer.num_row_groups):
        stop = start + footer.row_group(group).num_rows
        yield Block(raw.path, group, start, stop)
        on_read(raw.size // footer.num_row_groups)
        start = stop


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file to read row groups from; an error in reading it becomes a UserError."""
    with _user_errors(path), _open(path) as file:
        yield pq.ParquetFile(file)


def _read_blocks(path: str, raw: IO[bytes], on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the blocks of a compressed or remote file, with their lines."""
    index, start, rest, position = 0, 0, b"", 0
    compressed = _is_gzip(path, raw)
    for chunk in _gunzipped(raw) if compressed else iter(lambda: raw.read(BLOCK_BYTES), b""):
        on_read(raw.tell() - position)
        position = raw.tell()
        end = chunk.rfind(b"\n") + 1
        if not end:
            rest += chunk
            if len(rest) > BLOCK_BYTES:
                raise _line_too_long(path, start)
            continue
        data, rest = rest + chunk[:end], chunk[end:]
        yield Block(path, index, start, start + len(data), data)
        index, start = index + 1, start + len(data)
    if rest:
        yield Block(path, index, start, start + len(rest), rest)


def _gunzipped(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the text of a gzip file, of one or more members, in buffers of ``BLOCK_BYTES``; checksums are verified.

    gzip.GzipFile takes a third longer, since it reads small buffers.
    """
    member, compressed = zlib.decompressobj(wbits=31), raw.read(_GZIP_BYTES)
    buffers: list[bytes] = []
    size = 0
    while compressed:
        buffers.append(member.decompress(compressed, BLOCK_BYTES - size))
        size += len(buffers[-1])
        if size == BLOCK_BYTES:
            yield b"".join(buffers)
            buffers, size = [], 0
        if member.eof:
            # Another member may follow, after zero padding.
            compressed = member.unused_data.lstrip(b"\0")
            while not compressed and (following := raw.read(_GZIP_BYTES)):
                compressed = following.lstrip(b"\0")
            if compressed:
                member = zlib.decompressobj(wbits=31)
        else:
            compressed = member.unconsumed_tail or raw.read(_GZIP_BYTES)
    buffers.append(member.flush())  # output that did not fit when the last input was read
    if not member.eof:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")
    if rest := b"".join(buffers):
        yield rest


def _ranges(raw: RawFile, file: IO[bytes], on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the blocks of a plain local file as ranges of bytes that end with a line."""
    index, start = 0, 0
    while start < raw.size:
        stop = min(start + BLOCK_BYTES, raw.size)
        if stop < raw.size:
            file.seek(stop - 1)
            rest = file.readline(BLOCK_BYTES)  # the rest of the line that contains the block's last byte
            stop += len(rest) - 1
            if len(rest) == BLOCK_BYTES and not rest.endswith(b"\n"):
                raise _line_too_long(raw.path, start)
        yield Block(raw.path, index, start, stop)
        on_read(stop - start)
        index, start = index + 1, stop


def _line_too_long(path: str, start: int) -> UserError:
    return UserError(f"{path}: after byte {start}, a line has more than {BLOCK_BYTES} bytes; is it a text file?")


def _is_local(path: str) -> bool:
    return "://" not in path


def _open(path: str) -> Any:
    return open(path, "rb") if _is_local(path) else fsspec.open(path, "rb").open()


def _size_and_stamp(path: str, file: IO[bytes]) -> tuple[int, str]:
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
        raise UserError(f"{path}: is empty")
    if magic != _GZIP_MAGIC and path.endswith(".gz"):
        raise UserError(f"{path}: is named .gz but is not a gzip file; rename it or compress it")
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
                f"{path}: line 1: the header {decoded!r:.80} is not a line of column names: {error}"
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
def _user_errors(path: str) -> Iterator[None]:
    """Turn what reading a file may raise into a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or corrupt gzip file: {error}") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a complete Parquet file: {str(error).partition(chr(10))[0]}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: No such file or directory") from error
    except (OSError, ImportError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read: {reason}") from error
