"""Turn raw rows into the inputs of a model, in plain Python: texts and numbers become ids and float32 numbers.

    from raw_rows import RawRows
    encoder = RawRows("exports/criteo/preprocessing")
    dense, ids, lengths, *weights = encoder.tensors([{"I1": "3", "C1": "68fd1e64", ...}, ...])

A row has a value for each of `encoder.columns`: a text, a number, True or False, None for a missing value, or a list
of these. The result has the bits that `mlet prepare` gives the same values; raw_rows.h does the same in C++. The page
"Serve raw values" of mlet_dist's documentation has the formats of the files.
"""

import json
import math
import mmap
import re
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, NamedTuple

FORMAT_VERSION = 1
FLOAT32_MAX = 3.4028234663852886e38

_MASK = (1 << 64) - 1
_SPACE = "".join(
    map(chr, [*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F])
) + "\u205f\u3000"  # fmt: skip
_INTEGER = re.compile(r"[+-]?[0-9]+(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_GAP = r"[\t\n\f\r ]"
_NUMBERS_WITHOUT_COMMAS = re.compile(rf"[0-9.eE+-]+({_GAP}+[0-9.eE+-]+)+")
_TEXTS_WITHOUT_COMMAS = re.compile(rf"'[^']*'({_GAP}+'[^']*')+")
_QUOTED = re.compile("""'.*'|".*\"""")
_HALF_QUOTED = re.compile("""['"].*[^'"]|['"]|[^'"].*['"]""")
_MISSING_ELEMENTS = {"None", "null", "nan", "NaN", "<NA>", "NaT"}
_EXACT = 2.0**53
_LIBM_ERROR = 2.0**-50  # relative; the last bits of a float64 logarithm depend on the machine
_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"MLETVOC1"


class Request(NamedTuple):
    """The inputs of a model, as plain lists.

    ``dense`` holds a list of float32 numbers for each row; ``ids`` those of the first feature, row after row, then
    those of the second, and so on; ``lengths`` a list for each feature with the number of ids of each row; ``weights``
    a float32 number for each id, or None if no feature has weights.
    """

    dense: list[list[float]]
    ids: list[int]
    lengths: list[list[int]]
    weights: list[float] | None


class InvalidRow(ValueError):
    """A row has a value that `mlet prepare` would take for malformed, or lacks a column."""


class RawRows:
    """The preprocessing of a model. Files of vocabularies are mapped into memory, which processes share.

    Args:
        directory: with ``preprocessing.json`` and the files that it names.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        rules = json.loads((directory / "preprocessing.json").read_text(encoding="utf-8"))
        if rules["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{directory}: format_version is {rules['format_version']} instead of {FORMAT_VERSION}")
        self.columns: list[str] = rules["columns"]
        self._dense, self._sparse = rules["dense"], rules["sparse"]
        self._missing_weights = {"missing_texts": rules["missing_weights"], "ignore_case": True, "missing_numbers": []}
        self._tables = {name: _Table(directory, each) for name, each in rules["tables"].items()}
        self.is_weighted = any(each["weights"] or each["weight_separator"] for each in self._sparse)

    def tensors(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        """Return dense (rows, columns) float32, ids int64, lengths (features, rows) int64, and weights if there are."""
        import torch

        found = self.encode(rows)
        dense = torch.tensor(found.dense, dtype=torch.float32).view(len(rows), len(self._dense))
        plain = dense, torch.tensor(found.ids, dtype=torch.int64), torch.tensor(found.lengths, dtype=torch.int64)
        return plain if found.weights is None else (*plain, torch.tensor(found.weights, dtype=torch.float32))

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Request:
        """Return the inputs of the model; raise InvalidRow for a row that has none."""
        for number, row in enumerate(rows):
            for column in self.columns:
                if column not in row:
                    raise InvalidRow(f"row {number} lacks the column {column!r}; a missing value is None")
        dense = [[0.0] * len(self._dense) for _ in rows]
        for place, rules in enumerate(self._dense):
            for number, row in enumerate(rows):
                dense[number][place] = self._dense_value(row[rules["column"]], rules, number)
        ids: list[int] = []
        lengths: list[list[int]] = []
        weights: list[float] = []
        for rules in self._sparse:
            table, of_rows = self._tables[rules["table"]], []
            for number, row in enumerate(rows):
                texts, of_texts = self._values(row, rules, number)
                ids += [table.id_of(text) for text in texts]
                weights += of_texts or [1.0] * len(texts)
                of_rows.append(len(texts))
            lengths.append(of_rows)
        return Request(dense, ids, lengths, weights if self.is_weighted else None)

    def _dense_value(self, value: Any, rules: Mapping[str, Any], row: int) -> float:
        number, is_missing = _number(value, rules, rules["integer"])
        if number is None and isinstance(value, str):
            number = {"false": 0.0, "true": 1.0}.get(_lower(value.strip(_SPACE)))
        missing = rules["missing"]
        if is_missing:
            if missing == "refuse":
                raise _invalid(row, rules["column"], value, "a number")
            number = rules["mean"] if missing == "mean" else missing
        elif number is None or not abs(number) <= FLOAT32_MAX:
            raise _invalid(row, rules["column"], value, "an integer" if rules["integer"] else "a float32 number")
        assert number is not None
        if rules["transform"] == "log1p":
            return log1p(number)
        if rules["transform"] == "standardise":
            number = (number - rules["mean"]) / rules["deviation"]
            if not abs(number) <= FLOAT32_MAX:
                raise _invalid(row, rules["column"], value, "a number fewer deviations from the mean")
        return _float32(number)

    def _values(self, row: Mapping[str, Any], rules: Mapping[str, Any], number: int) -> tuple[list[str], list[float]]:
        """Return the texts of a row that have ids, and their weights, if the feature has any."""
        value = row[rules["column"]]
        if not rules["multi_valued"]:
            text, _, is_valid = _text(value, rules["cast"], rules)
            if not is_valid:
                raise _invalid(number, rules["column"], value, "a text or a whole number")
            return [text], []
        elements = _elements(value, rules)
        if elements is None:
            raise _invalid(number, rules["column"], value, "a list")
        pairs: list[str] = []
        if rules["weight_separator"] is not None:
            texts = [_text(each, "text", _NOTHING_MISSING)[0] for each in elements]
            parts = [text.rpartition(rules["weight_separator"]) for text in texts]
            if any(text and not between for text, (_, between, _) in zip(texts, parts, strict=True)):
                raise _invalid(number, rules["column"], value, f"pairs such as a{rules['weight_separator']}0.5")
            elements, pairs = [each[0].strip(_SPACE) for each in parts], [each[2] for each in parts]
        found = [_text(each, rules["cast"], rules) for each in elements]
        if not all(is_valid for _, _, is_valid in found):
            raise _invalid(number, rules["column"], value, "a list of texts or whole numbers")
        present = [place for place, (_, is_missing, _) in enumerate(found) if not is_missing]
        kept = present
        if rules["max_len"] is not None:
            kept = present[: rules["max_len"]] if rules["keep"] == "first" else present[-rules["max_len"] :]
        weights: list[float] = []
        if pairs:
            numbers = [_number(pairs[place], self._missing_weights, False)[0] for place in kept]
            weights = _weights(numbers, number, rules["column"], value)
        elif rules["weights"] is not None:
            by_place = self._weights_by_place(row[rules["weights"]], len(elements), present, rules, number)
            weights = [by_place[place] for place in kept]
        return [found[place][0] for place in kept], weights

    def _weights_by_place(
        self, value: Any, length: int, present: list[int], rules: Mapping[str, Any], row: int
    ) -> dict[int, float]:
        """Return the weight of each present value, from a column of their own."""
        elements = _elements(value, rules)
        if elements is None:
            raise _invalid(row, rules["weights"], value, "a list of numbers")
        numbers = [_number(each, self._missing_weights, False) for each in elements]
        given = [number for number, is_missing in numbers if not is_missing]
        if len(numbers) == length:  # a weight belongs to the value at its place
            given = [numbers[place][0] for place in present]
        elif len(given) != len(present):
            raise _invalid(row, rules["weights"], value, f"{len(present)} weights")
        return dict(zip(present, _weights(given, row, rules["weights"], value), strict=True))


class _Table:
    """The ids of a table: those of its vocabulary, or hashes."""

    def __init__(self, directory: Path, rules: Mapping[str, Any]) -> None:
        self._salt, self._rows = int(rules["salt"], 16), rules["num_embeddings"]
        self._count: int | None = None
        if rules["vocabulary"] is None:
            return
        if sys.byteorder != "little":
            raise ValueError("vocabularies are little-endian files, and this machine is big-endian")
        path = directory / rules["vocabulary"]
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        magic, count, text_bytes = _HEADER.unpack_from(content)
        hashes = _HEADER.size
        offsets, ids = hashes + 8 * count, hashes + 16 * count + 8
        texts = ids + 4 * count
        if magic != _MAGIC or len(content) != texts + text_bytes or count + 1 != self._rows:
            raise ValueError(f"{path}: is damaged, or no vocabulary of {self._rows - 1} values")
        self._count = count
        self._hashes, self._offsets = content[hashes:offsets].cast("Q"), content[offsets:ids].cast("Q")
        self._ids, self._texts = content[ids:texts].cast("I"), content[texts:]

    def id_of(self, text: str) -> int:
        value = text.encode()
        hashed = hash_text(value, self._salt)
        if self._count is None:
            return hashed % self._rows
        place = bisect_left(self._hashes, hashed)
        while place < self._count and self._hashes[place] == hashed:  # values may share a hash
            found = self._ids[place]
            if self._texts[self._offsets[found - 1] : self._offsets[found]] == value:
                return found
            place += 1
        return 0


def hash_text(text: bytes, salt: int) -> int:
    """Return the hash of the UTF-8 bytes of a text, from 0 to 2^64 - 1."""
    state = (salt + len(text)) & _MASK
    for start in range(0, len(text), 8):
        state = _mix(state ^ int.from_bytes(text[start : start + 8], "little"))
    return _mix(state)


def log1p(number: float) -> float:
    """Return log(1 + max(number, 0)), rounded to the nearest float32 number."""
    number = max(number, 0.0) + 0.0  # never -0.0
    found = math.log1p(number)
    low, high = _float32(found * (1 - _LIBM_ERROR)), _float32(found * (1 + _LIBM_ERROR))
    if low == high:
        return low
    with localcontext(prec=100):
        return low if (Decimal(number) + 1).ln() < Decimal((low + high) / 2) else high


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _invalid(row: int, column: str, value: Any, expected: str) -> InvalidRow:
    return InvalidRow(f"row {row}: column {column!r} is {value!r:.60} instead of {expected}")


def _weights(numbers: Iterable[float | None], row: int, column: str, value: Any) -> list[float]:
    found = []
    for number in numbers:
        if number is None or not abs(number) <= FLOAT32_MAX:
            raise _invalid(row, column, value, "a list with float32 weights")
        found.append(_float32(number))
    return found


def _lower(text: str) -> str:
    """Return a text with ASCII letters in lower case, and the two other letters whose lower case is ASCII."""
    text = text.replace("\u0130", "i").replace("\u212a", "k")
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)


_NOTHING_MISSING = {"missing_texts": [""], "ignore_case": False}


def _number(value: Any, rules: Mapping[str, Any], integer: bool) -> tuple[float | None, bool]:
    """Return a number, None for a value that is none, and whether the value is missing."""
    if value is None:
        return None, True
    number: float | None = None
    if isinstance(value, str):
        text = value.strip(_SPACE)
        if not (text.isascii() and text.isdigit()):
            if (_lower(text) if rules["ignore_case"] else text) in rules["missing_texts"]:
                return None, True
            if not (_INTEGER if integer else _NUMBER).fullmatch(text):
                return None, False
        number = float(text)
    elif isinstance(value, bool | int | float):
        try:
            number = float(value)
        except OverflowError:
            return None, False
        if math.isnan(number):
            return None, True
    if number is not None and number in rules["missing_numbers"]:
        return None, True
    if number is not None and integer and math.isfinite(number) and number != math.trunc(number):
        return None, False
    return number, False


def _text(value: Any, cast: str | None, rules: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """Return a category as text, whether it is missing, and whether it is valid; empty unless it is a valid value."""
    text, is_valid = "", True
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "", True, True
    if isinstance(value, str):
        text = value.strip(_SPACE) if cast == "integer" else value
        is_valid = not any("\ud800" <= c <= "\udfff" for c in text)
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, float):
        if cast == "text":
            text = repr(value)
        elif math.isfinite(value) and value == math.trunc(value) and abs(value) <= _EXACT:
            text = str(int(value))
        else:
            is_valid = False
    else:
        is_valid = False
    if not is_valid:
        return "", False, False
    compared = text
    if rules["ignore_case"]:
        compared = _lower(text)
    elif cast == "integer":  # 7 and 7.0 are one number
        compared = _whole_number(text)
    if compared in rules["missing_texts"]:
        return "", True, True
    if cast == "integer" and isinstance(value, str):
        if not _INTEGER.fullmatch(text):
            return "", False, False
        text = _whole_number(text)
    return text, False, True


def _whole_number(text: str) -> str:
    """Return a whole number without a plus sign, leading zeros and zeros after the point; other texts as they are."""
    if not _INTEGER.fullmatch(text):
        return text
    digits = text.partition(".")[0].lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


def _elements(value: Any, rules: Mapping[str, Any]) -> list[Any] | None:
    """Return the elements of a list, or of a text that is one; None if it is neither."""
    separator = rules["separator"]
    if value is None:
        return []
    if isinstance(value, str):
        return _split(value, separator, rules["separator_in_brackets"])
    if isinstance(value, list | tuple):
        return list(value)
    if separator is not None and isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return None


def _split(text: str, separator: str | None, in_brackets: str) -> list[str] | None:
    trimmed = text.strip(_SPACE)
    is_bracketed = _BRACKETS.fullmatch(trimmed) is not None
    if is_bracketed:
        text = trimmed[1:-1].strip(_SPACE)
        if separator is None and (_NUMBERS_WITHOUT_COMMAS.fullmatch(text) or _TEXTS_WITHOUT_COMMAS.fullmatch(text)):
            gap = f"'{_GAP}+'" if text.startswith("'") else f"{_GAP}+"
            text = re.sub(gap, "','" if text.startswith("'") else ",", text)
        around = rf"{_GAP}*{re.escape(in_brackets)}{_GAP}*" if in_brackets else f"{_GAP}+"
        text = re.sub(around, lambda _: separator or ",", text)
    elif separator is None and text:
        return None
    pieces = [piece.strip(_SPACE) for piece in text.split(separator or ",")] if text else []
    if not is_bracketed:
        return pieces
    for place, piece in enumerate(pieces):
        if _HALF_QUOTED.fullmatch(piece):  # a quoted text that contains the separator
            return None
        if _QUOTED.fullmatch(piece):
            pieces[place] = piece[1:-1]
        elif piece in _MISSING_ELEMENTS:
            pieces[place] = ""
    return pieces
