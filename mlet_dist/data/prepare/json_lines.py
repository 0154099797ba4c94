"""Parsing of lines of JSON objects into columns of texts, so that a value means the same as in a CSV file."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.data.prepare.text_lines import MAX_EXAMPLES, MAX_LINE_BYTES, Lines, not_text
from mlet_dist.errors import UserError

_LISTS = pa.list_(pa.string())


class JsonNumber(str):
    """The text of a number, as the line has it."""


def json_columns(
    spec: TableSpec, path: str, block: bytes, constants: Collection[str]
) -> tuple[dict[str, pa.Array], Lines]:
    """Return the used columns of a block of JSON lines, and the lines that they are from.

    A column is a dictionary of texts, or lists of texts for a multi-valued feature: numbers as they are written, true
    and false as such, and null or a missing key as null. A line is malformed if it is no JSON object, names a key
    twice, or holds an object, a list or a single value where another of them belongs.

    Raises:
        UserError: an object has a key that is also a directory of ``path``, one of ``constants``.
    """
    encoding = None if spec.text is None else spec.text.encoding
    lists = {each for f in spec.sparse if f.multi_valued and f.separator is None for each in (f.column, f.weights)}
    kinds = {name: name in lists for name in spec.used_columns if name not in constants}
    values: dict[str, list[Any]] = {name: [] for name in kinds}
    numbers: list[int] = []
    reasons: dict[int, str] = {}
    count = 0
    lines = block.split(b"\n")[:-1]
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        count += 1
        try:
            row = _row(path, line, kinds, constants, encoding)
        except ValueError as error:
            if len(reasons) < MAX_EXAMPLES:
                reasons[number] = str(error)
            continue
        numbers.append(number)
        for column, value in zip(values.values(), row, strict=True):
            column.append(value)
    columns = {
        name: pa.array(column, _LISTS) if kinds[name] else pa.array(column, pa.string()).dictionary_encode()
        for name, column in values.items()
    }
    return columns, Lines(b"", np.array(numbers, np.int64), count, len(lines), reasons)


def keys_of(start: bytes) -> tuple[str, ...]:
    """Return the keys of the objects at the start of a file of JSON lines, in the order in which they occur."""
    keys: dict[str, None] = {}
    for line in start.split(b"\n"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            keys.update(dict.fromkeys(found))
    return tuple(keys)


def _row(
    path: str, line: bytes, kinds: Mapping[str, bool], constants: Collection[str], encoding: str | None
) -> list[Any]:
    """Return the values of a line; raise ValueError with the reason why it is malformed."""
    if len(line) >= MAX_LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes; at most {MAX_LINE_BYTES - 1} are allowed")
    try:
        found = _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        raise ValueError(not_text(line, encoding)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("a JSON object that is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{_kind(found)} instead of a JSON object")
    for key in constants:
        if key in found:
            raise UserError(
                f"{path}: column {key!r} is in the file and in its path ({key}=…); rename the directory or the key"
            )
    return [_texts(name, found.get(name), is_list) for name, is_list in kinds.items()]


def _texts(name: str, value: Any, is_list: bool) -> Any:
    if not is_list:
        return _text(name, value, "a text, a number, true or false")
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{name} holds {_kind(value)} instead of a list")
    return [_text(name, each, "a list of texts or numbers") for each in value]


def _text(name: str, value: Any, expected: str) -> str | None:
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half of a surrogate pair, which is no text") from None
        return value
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"{name} holds {_kind(value)} instead of {expected}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", JsonNumber: "a number"}
    return kinds.get(type(value), "a text")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise ValueError(f"an object that has the key {twice!r} twice")
    return found


def json_constant(name: str) -> JsonNumber | None:
    """Return NaN, as Python writes a missing number, as null; Infinity is a number as it stands."""
    return None if name == "NaN" else JsonNumber(name)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=JsonNumber, parse_int=JsonNumber, parse_constant=json_constant
)
