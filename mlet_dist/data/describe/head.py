"""The first rows of a raw file, as columns of raw values: the kind of the file is recognised by its content."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mlet_dist.data.describe.delimited_head import split_head
from mlet_dist.data.prepare.compression import HEAD_BYTES
from mlet_dist.data.prepare.file_lists import directory_values, expand
from mlet_dist.data.prepare.json_lines import JsonNumber, json_constant
from mlet_dist.data.prepare.raw_blocks import open_parquet, text_blocks
from mlet_dist.data.prepare.raw_files import PARQUET_SUFFIXES, inspect_file, open_raw, raw_errors
from mlet_dist.data.prepare.raw_formats import JsonLines, TextFormat
from mlet_dist.errors import UserError

MAX_ROWS = 10_000
MAX_BYTES = 8 << 20  # of text

_AS_LINES = TextFormat("\t", None, header=False, columns=())


@dataclass(frozen=True)
class Head:
    """The first rows of the first raw file that has any.

    Attributes:
        path: the file.
        files: number of raw files.
        text: how lines are split into fields; None for Parquet.
        names: names of the columns, in order; they may occur twice.
        columns: (rows,) the raw values of each column, of any Arrow type.
        directories: the values, one for each raw file, of the directories ``key=value`` by key; None is missing.
        malformed: number of lines that cannot be parsed; they are not in ``columns``.
        complete: whether these are all rows there are.
    """

    path: str
    files: int
    text: TextFormat | JsonLines | None
    names: tuple[str, ...]
    columns: tuple[pa.Array, ...]
    directories: dict[str, tuple[str | None, ...]]
    malformed: int
    complete: bool

    @property
    def rows(self) -> int:
        """Number of rows that were read."""
        return len(self.columns[0]) if self.columns else 0


def read_head(name: str) -> Head:
    """Read the first rows of a file, or of the first file with rows of a directory or pattern.

    Raises:
        UserError: no file can be read or has rows, or its lines have no common number of fields.
    """
    paths = expand([name])
    pairs = [dict(directory_values(path)) for path in paths]
    keys = dict.fromkeys(key for each in pairs for key in each)
    directories = {key: tuple(each.get(key) for each in pairs) for key in keys}
    for path in paths:
        with raw_errors(path), open_raw(path) as file:
            start = file.read(HEAD_BYTES)
        if not start:
            continue
        is_parquet = start.startswith(b"PAR1") or path.endswith(PARQUET_SUFFIXES)
        head = _parquet(path, len(paths), directories) if is_parquet else _text(path, len(paths), directories)
        if head is not None:
            return head
    raise UserError(f"{name}: contains no rows to describe")


def _parquet(path: str, files: int, directories: dict[str, tuple[str | None, ...]]) -> Head | None:
    if not inspect_file(path, None, ()).columns:
        return None
    with raw_errors(path), open_parquet(path) as file:
        total, batches = file.metadata.num_rows, []
        for batch in file.iter_batches(batch_size=MAX_ROWS, use_threads=False):
            batches.append(batch)
            if sum(each.num_rows for each in batches) >= MAX_ROWS:
                break
        table = pa.Table.from_batches(batches).slice(0, MAX_ROWS)
        columns = tuple(_combined(column) for column in table.columns)
    complete = files == 1 and total <= MAX_ROWS
    return Head(path, files, None, tuple(table.schema.names), columns, directories, 0, complete)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):  # whose chunks have dictionaries of their own
        column = column.cast(column.type.value_type)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _text(path: str, files: int, directories: dict[str, tuple[str | None, ...]]) -> Head | None:
    data, complete = _first_bytes(path, None)
    encoding = guess_encoding(data)
    if encoding is not None:
        data, complete = _first_bytes(path, encoding)
    # Invalid bytes become a NUL, which makes the line malformed, as `mlet prepare` finds it.
    text = data.decode(errors="surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = [line if _is_utf8(line) else "\0" for line in lines if line]
    if not lines:
        return None
    complete = complete and files == 1 and len(lines) <= MAX_ROWS
    lines = lines[: MAX_ROWS + 1]
    if _is_json(lines[0].strip()):
        columns, malformed = _json_columns(path, lines)
        arrays = tuple(columns.values())
        return Head(path, files, JsonLines(encoding), tuple(columns), arrays, directories, malformed, complete)
    found = split_head(lines, encoding)
    if found is None:
        raise UserError(
            f"{path}: the lines have no common delimiter: no character gives nine tenths of them the same number of "
            f"fields, at least two, as the first line has: {lines[0]!r:.80}"
        )
    if not len(found.columns[0]):
        return None
    arrays = tuple(column.slice(0, MAX_ROWS) for column in found.columns)
    return Head(path, files, found.text, found.names, arrays, directories, found.malformed, complete)


def _first_bytes(path: str, encoding: str | None) -> tuple[bytes, bool]:
    """Return the first lines of a file as UTF-8, at most ``MAX_BYTES`` of them or one line, and whether that is all."""
    blocks = text_blocks(inspect_file(path, _AS_LINES, ()), lambda _: None, encoding)
    block = next(blocks, None)
    if block is None:
        return b"", True
    data = block.read()
    complete = len(data) <= MAX_BYTES and next(blocks, None) is None
    if len(data) > MAX_BYTES:
        end = data.rfind(b"\n", 0, MAX_BYTES) + 1 or data.index(b"\n") + 1
        data = data[:end]
    return data, complete


def guess_encoding(data: bytes) -> str | None:
    """Return the encoding of text that is not UTF-8, as far as its bytes tell; None for UTF-8."""
    start = data[:4096]
    if start.count(b"\0") > len(start) // 4:
        return "utf-16-le" if start[1::2].count(b"\0") >= start[::2].count(b"\0") else "utf-16-be"
    try:
        data.decode()
        return None
    except UnicodeDecodeError:
        pass
    if any(not c.isascii() and not "\udc80" <= c <= "\udcff" for c in data.decode(errors="surrogateescape")):
        return None  # UTF-8 with damaged lines
    try:
        data.decode("cp1252")
        return "cp1252"
    except UnicodeDecodeError:
        return "latin-1"


def _is_json(line: str) -> bool:
    """Return whether the first line of a text is a JSON object, or the beginning of a JSON document."""
    if line.startswith(('{"', "[{")) or line in ("{", "["):
        return True
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_utf8(line: str) -> bool:
    return line.isascii() or not any("\ud800" <= character <= "\udfff" for character in line)


def _json_columns(path: str, lines: Sequence[str]) -> tuple[dict[str, pa.Array], int]:
    """Return the values of each key: texts, lists of texts, or a null type for objects and mixtures of them."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line, parse_float=JsonNumber, parse_int=JsonNumber, parse_constant=json_constant)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    if not rows or len(rows) < len(lines) / 2:
        raise UserError(
            f"{path}: begins with {lines[0]!r:.40}, but its lines are not JSON objects; write one object on each line"
        )
    columns = {}
    for key in dict.fromkeys(key for row in rows[:MAX_ROWS] for key in row):
        columns[key] = _json_column([row.get(key) for row in rows[:MAX_ROWS]])
    return columns, len(lines) - len(rows)


def _json_column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {list}:
        elements = [each for value in values if value is not None for each in value]
        if all(each is None or isinstance(each, str | bool) for each in elements):
            lists = [None if value is None else [_json_text(each) for each in value] for value in values]
            return _without_surrogates(lists, pa.list_(pa.string()))
    elif not kinds & {list, dict}:
        return _without_surrogates([_json_text(value) for value in values], pa.string())
    # What `mlet prepare` cannot read; the type tells the guesses so.
    return pa.array([None if value is None else {} for value in values], pa.struct([]))


def _without_surrogates(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # half of a surrogate pair, which makes the line malformed
        return pa.array([None if value is None else {} for value in values], pa.struct([]))


def _json_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None else str(value)
