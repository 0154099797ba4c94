"""Raw files, local or remote: opened, recognised and inspected before any is read."""

import csv
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.prepare.compression import HEAD_BYTES, compression_of, decompressed, foreign_kind
from mlet_dist.data.prepare.file_lists import directory_values
from mlet_dist.data.prepare.json_lines import keys_of
from mlet_dist.data.prepare.raw_formats import JsonLines, TextFormat
from mlet_dist.data.prepare.text_encoding import UTF8, UTF8_MARK, encoding_of, to_utf8
from mlet_dist.data.prepare.text_lines import free_character
from mlet_dist.errors import UserError
from mlet_dist.regular_file import special_kind
from mlet_dist.storage import as_user_error, open_filesystem
from mlet_dist.urls import is_url

MAX_HEADER_BYTES = 16 << 20
HEADER_BUFFER_BYTES = 1 << 16
PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_HEAD_BYTES = 1 << 20  # of a file of JSON lines, whose keys are looked at

_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".sz", ".lzma")


@dataclass(frozen=True)
class RawFile:
    """A raw file, with what identifies its current content.

    Attributes:
        path: local path, or a URL that fsspec opens.
        size: size in bytes.
        stamp: time of the last change, or the ETag or time that a remote store reports.
        columns: names of the fields of a line in order (from the file's header, if it has one), of a Parquet file's
            columns, or of the keys at the start of a file of JSON lines; none if the file has no rows.
        constants: the used columns that are directories ``key=value`` of the path, with their values; None is missing.
    """

    path: str
    size: int
    stamp: str
    columns: tuple[str, ...]
    constants: tuple[tuple[str, str | None], ...] = ()


def inspect_file(
    path: str,
    text: TextFormat | JsonLines | None,
    used: tuple[str, ...],
    defaults: tuple[tuple[str, str], ...] = (),
) -> RawFile:
    """Check that a file can be opened and has the ``used`` columns, without reading it.

    Columns of ``defaults`` that it lacks have the value given there in all rows.

    Raises:
        UserError: the file cannot be opened, is of another kind, or lacks a column.
    """
    with raw_errors(path), open_raw(path) as file:
        size, stamp = _size_and_stamp(path, file)
        if not file.read(1):
            return RawFile(path, size, stamp, ())
        file.seek(0)
        if text is None:
            columns = _parquet_columns(path, file)
        elif isinstance(text, JsonLines):
            columns = _json_keys(path, file, text)
        elif text.header:
            columns = _header(path, file, text)
        else:
            columns = text.columns or ()
            converted_text(path, file, text.encoding, HEAD_BYTES)  # raises if it is not text
    pairs = directory_values(path)
    constants: tuple[tuple[str, str | None], ...] = tuple((key, value) for key, value in pairs if key in used)
    constants += tuple((key, value) for key, value in defaults if key not in columns and key not in dict(constants))
    if columns:
        _check_columns(path, text, used, columns, [key for key, _ in constants])
    return RawFile(path, size, stamp, tuple(columns), constants)


def _check_columns(
    path: str, text: TextFormat | JsonLines | None, used: tuple[str, ...], columns: tuple[str, ...], keys: list[str]
) -> None:
    for column in used:
        in_file, in_path = columns.count(column), keys.count(column)
        if in_file and in_path:
            raise UserError(
                f"{path}: column {column!r} is in the file and in its path ({column}=…); rename the directory or "
                "remove the column"
            )
        if in_path > 1:
            raise UserError(f"{path}: the path names {column}=… more than once; rename one of the directories")
        if in_file + in_path == 1 or isinstance(text, JsonLines):  # a key may be missing from some objects
            continue
        if text is not None and not text.header:
            raise UserError(
                f"{path}: column {column!r}, which the description uses, is neither one of its `columns` nor a "
                f"directory {column}=… of the path"
            )
        problem = "has no column" if not in_file else "has more than one column"
        where = path if text is None else f"{path}: line 1: the header"
        raise UserError(f"{where} {problem} {column!r}; it has {', '.join(columns):.300}")


def first_fields(path: str, text: TextFormat) -> list[str]:
    """Return the fields of the first line of a file of delimited text, a header or not; none if it is blank.

    Raises:
        UserError: the file cannot be opened, or is not text.
    """
    with raw_errors(path), open_raw(path) as file:
        line = _first_text(path, file, text, HEADER_BUFFER_BYTES).partition(b"\n")[0].rstrip(b"\r")
    return _split_header(path, line.decode(errors="replace"), text) if line else []


def open_raw(path: str) -> Any:
    """Open a raw file for reading bytes; a FIFO, a socket or a device, which may never end, is a UserError."""
    if is_url(path):
        filesystem, inner = open_filesystem(path)
        return filesystem.open(inner, "rb")
    if (kind := special_kind(os.stat(path).st_mode)) is not None:
        raise UserError(f"{path}: is {kind}; raw data is read more than once, so write it to a regular file first")
    return open(path, "rb")


def converted_text(path: str, file: IO[bytes], encoding: str | None, buffer_bytes: int) -> Iterator[bytes] | None:
    """Return the text of a compressed file, or of one in another encoding, as UTF-8 in pieces; None for plain UTF-8.

    Args:
        path: name of the file in messages.
        file: the file, at its start.
        encoding: the encoding where there is no byte order mark; None is UTF-8.
        buffer_bytes: size of the pieces, before they are converted to UTF-8.

    Raises:
        UserError: the file is known not to be text; or, while iterating, is truncated or corrupt.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    compression = compression_of(head)
    if compression is None:
        _check_is_text(path, head)
        if path.endswith(_COMPRESSED_SUFFIXES) and b"\0" in head and encoding_of(head, None) == UTF8:
            suffix = path.rpartition(".")[2]
            raise UserError(f"{path}: is named .{suffix} but is neither compressed nor text; rename it or compress it")
        found = encoding_of(head, encoding)
        return None if found == UTF8 else to_utf8(plain_pieces(file, buffer_bytes), found)
    pieces = decompressed(path, compression, file, buffer_bytes)
    first = next(pieces, b"")
    if twice := compression_of(first):
        raise UserError(f"{path}: holds a {twice} file within a {compression} file; decompress it once")
    _check_is_text(path, first)
    found = encoding_of(first, encoding)
    pieces = chain([first], pieces) if first else iter(())
    return pieces if found == UTF8 else to_utf8(pieces, found)


def plain_pieces(file: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of a file in pieces."""
    return iter(lambda: file.read(buffer_bytes), b"")


def _check_is_text(path: str, head: bytes) -> None:
    if (kind := foreign_kind(head)) is not None:
        raise UserError(f"{path}: is not text but {kind}")


def _first_text(path: str, file: IO[bytes], text: TextFormat | JsonLines, size: int) -> bytes:
    """Return the text at the start of a file as UTF-8 without a byte order mark: at least its first line.

    It has ``size`` bytes or more unless the file is shorter.
    """
    pieces = converted_text(path, file, text.encoding, HEADER_BUFFER_BYTES) or plain_pieces(file, HEADER_BUFFER_BYTES)
    found: list[bytes] = []
    total, has_line = 0, False
    for piece in pieces:
        found.append(piece)
        total, has_line = total + len(piece), has_line or b"\n" in piece
        if (has_line and total >= size) or total > MAX_HEADER_BYTES:
            break
    return b"".join(found).removeprefix(UTF8_MARK)


def _header(path: str, file: IO[bytes], text: TextFormat) -> tuple[str, ...]:
    """Return the names of the columns; none if the file has nothing but blank lines."""
    start = _first_text(path, file, text, HEADER_BUFFER_BYTES)
    if len(start) < HEADER_BUFFER_BYTES and not start.strip(b"\r\n"):
        return ()
    line = start.partition(b"\n")[0].rstrip(b"\r")
    if not line:
        raise UserError(f"{path}: line 1 is blank; the first line must name the columns")
    if b"\r" in line:
        raise UserError(f"{path}: line 1: the header holds carriage returns; lines must end with \\n or \\r\\n")
    has_key = text.columns is None  # criteo and avazu have no description
    if b"\0" in line:
        advice = "; if it is UTF-16, set `encoding: utf-16-le` or utf-16-be in the description" if has_key else ""
        raise UserError(f"{path}: line 1: the header holds NUL bytes{advice}")
    try:
        decoded = line.decode()
    except UnicodeDecodeError:
        advice = "; set `encoding` in the description, such as cp1252 or latin-1" if has_key else ""
        raise UserError(f"{path}: line 1: the header is not {text.encoding or 'UTF-8'} text{advice}") from None
    names = _split_header(path, decoded, text)
    if text.columns is not None and tuple(names) != text.columns:
        raise UserError(
            f"{path}: line 1: the header is {decoded!r:.200} instead of {text.delimiter.join(text.columns)!r}"
        )
    return tuple(names)


def _split_header(path: str, line: str, text: TextFormat) -> list[str]:
    if text.quote is None:
        return line.split(text.delimiter)
    delimiter = text.delimiter
    if len(delimiter) > 1 or not delimiter.isascii():
        delimiter = free_character(line.encode())
        line = line.replace(text.delimiter, delimiter)
    try:
        names: list[str] = next(csv.reader([line], delimiter=delimiter, quotechar=text.quote), [])
    except csv.Error as error:
        raise UserError(f"{path}: line 1: the header {line!r:.80} is not a line of column names: {error}") from None
    return [name.replace(delimiter, text.delimiter) for name in names] if delimiter != text.delimiter else names


def _json_keys(path: str, file: IO[bytes], text: JsonLines) -> tuple[str, ...]:
    return keys_of(_first_text(path, file, text, JSON_HEAD_BYTES))


def _parquet_columns(path: str, file: IO[bytes]) -> tuple[str, ...]:
    """Return the names of the columns; none if the file has no rows."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if (compression := compression_of(head)) is not None:
        raise UserError(f"{path}: is a {compression} file instead of a Parquet file; decompress it")
    if not path.endswith(PARQUET_SUFFIXES) and not head.startswith(b"PAR1"):
        raise UserError(f"{path}: is not a Parquet file")
    found = pq.ParquetFile(file)
    return tuple(found.schema_arrow.names) if found.metadata.num_rows else ()


def _size_and_stamp(path: str, file: IO[bytes]) -> tuple[int, str]:
    if not is_url(path):
        status = os.fstat(file.fileno())
        return status.st_size, str(status.st_mtime_ns)
    filesystem, inner = open_filesystem(path)
    info = filesystem.info(inner)
    stamps = (info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return int(info["size"] or 0), str(next((stamp for stamp in stamps if stamp is not None), ""))


@contextmanager
def raw_errors(path: str) -> Iterator[None]:
    """Turn what reading a file may raise into a UserError that names it."""
    with as_user_error(path):
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{path}: truncated or corrupt: {error}") from error
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a complete Parquet file: {str(error).partition(chr(10))[0]}") from error
