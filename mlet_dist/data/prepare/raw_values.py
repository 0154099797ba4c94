"""Raw values of any Arrow type as texts or numbers: which are missing, and which have no exact reading.

Values of one meaning get one text, whatever wrote them: the whole number 7 is ``7`` as an integer, as a double 7.0 and
as a decimal 7.00, and a timestamp has the same text whatever its unit.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Flags = npt.NDArray[np.bool_]
Cast = Literal["text", "integer"]

# Spellings of a missing value, in lower case: in columns of numbers, where none of them can be a value, and in columns
# of text, where NA or - may well be one.
MISSING_NUMBERS = (
    *("", "null", "(null)", "\\n", "nan", "-nan", "na", "<na>", "n/a", "#n/a", "none", "nil", "nat", "?", "-", "--"),
    *(".", "missing", "unknown", "undefined"),
)
MISSING_TEXTS = ("", "\\N")

INTEGER = r"^[+-]?[0-9]+(\.0*)?$"
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_EXACT = 2.0**53  # up to here, a double holds every whole number


def as_texts(
    values: pa.Array, cast: Cast | None, missing_values: Sequence[str] | None
) -> tuple[pa.StringArray, Flags, Flags]:
    """Return categories as texts.

    Args:
        values: an array of any type but dictionary.
        cast: ``integer`` takes whole numbers only, and writes them without leading zeros; ``text`` takes numbers with
            a fraction, too, as they stand in CSV files (7.0 is not 7). None takes texts as they are, and numbers of
            other types if they are whole.
        missing_values: the spellings of missing values besides the empty text; None for the default ones.

    Returns:
        The texts, empty where a value is missing or invalid; which values are missing; and which are valid. Missing
        values are valid.
    """
    values = _stored(values)
    absent = values.is_null().to_numpy(zero_copy_only=False)
    texts, valid = _texts(values, cast)
    texts = texts.fill_null("") if texts.null_count else texts
    if cast == "integer":
        texts = pc.utf8_trim_whitespace(texts)
    spellings = missing_categories(cast, missing_values)
    compared = texts
    if cast == "integer":  # of given spellings, -1 and -1.0 are one number
        compared = pc.utf8_lower(texts) if missing_values is None else canonical_texts(texts)
    if is_text(values.type) or missing_values is not None:
        absent = absent | (_is_in(compared, spellings) & valid)
    if pa.types.is_floating(values.type):
        absent = absent | np.isnan(values.cast(pa.float64()).fill_null(0).to_numpy())
    if cast == "integer" and is_text(values.type):
        valid = valid & matches(texts, INTEGER)
        texts = pc.if_else(pa.array(valid), _whole_numbers(texts), "")
    if absent.any():
        texts = pc.if_else(pa.array(absent), "", texts)
    return texts, absent, valid | absent


def missing_categories(cast: Cast | None, missing_values: Sequence[str] | None) -> tuple[str, ...]:
    """Return the spellings of missing values that ``as_texts`` compares texts with.

    With ``cast: integer``, these are in lower case where they are the default ones, and ``canonical_texts`` of others.
    """
    if missing_values is None:
        return MISSING_NUMBERS if cast == "integer" else MISSING_TEXTS
    spellings = ("", *missing_values)
    return tuple(canonical_texts(pa.array(spellings, pa.string())).to_pylist()) if cast == "integer" else spellings


def as_numbers(
    values: pa.Array, integer: bool, missing_values: Sequence[str] | None
) -> tuple[npt.NDArray[np.float64], Flags]:
    """Return values as float64, NaN where a value is missing or no number, and which are missing.

    Args:
        values: an array of any type but dictionary.
        integer: whether numbers with a fraction are no numbers.
        missing_values: as in ``as_texts``.
    """
    values = _stored(values)
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan), np.ones(len(values), dtype=bool)
    if is_text(values.type):
        texts, valid = _texts(values, "text")
        texts = pc.utf8_trim_whitespace(texts.fill_null(""))
        digits = _flags(pc.ascii_is_decimal(texts))
        # Only what is not all digits is compared with spellings and patterns, which takes most of the time.
        others = np.flatnonzero(valid & ~digits)
        compared = texts.take(pa.array(others))
        absent = np.zeros(len(texts), dtype=bool)
        if missing_values is None:
            absent[others] = _is_in(pc.utf8_lower(compared), MISSING_NUMBERS)
        else:
            absent[others] = _is_in(compared, ("", *missing_values))
        digits[others] = matches(compared, INTEGER if integer else NUMBER) & ~absent[others]
        numbers = np.full(len(texts), np.nan)
        numbers[digits] = texts.filter(pa.array(digits)).cast(pa.float64()).to_numpy()
        absent = absent | _stands_for_missing(numbers, missing_values)
        numbers[absent] = np.nan
        return numbers, absent
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not (is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        return np.full(len(values), np.nan), values.is_null().to_numpy(zero_copy_only=False)
    absent = values.is_null().to_numpy(zero_copy_only=False)
    numbers = values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy().copy()
    absent = absent | np.isnan(numbers) | _stands_for_missing(numbers, missing_values)
    numbers[absent] = np.nan
    if integer:
        numbers = np.where(numbers == np.trunc(numbers), numbers, np.nan)
    return numbers, absent


def _stands_for_missing(numbers: npt.NDArray[np.float64], missing_values: Sequence[str] | None) -> Flags:
    """Return which numbers are those of a spelling: -1 and -1.0 are one number."""
    return np.isin(numbers, missing_numbers(missing_values)) if missing_values else np.zeros(len(numbers), dtype=bool)


def missing_numbers(missing_values: Sequence[str] | None) -> list[float]:
    """Return the finite numbers among the spellings of missing values."""
    numbers = as_numbers(pa.array(list(missing_values or ()), pa.string()), False, ())[0]
    return [float(each) for each in numbers if np.isfinite(each)]


def canonical_texts(texts: pa.StringArray) -> pa.StringArray:
    """Return texts without white space around them, and whole numbers in one form: 1, +1, 01 and 1.0 are the same."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pa.array(matches(trimmed, INTEGER)), _whole_numbers(trimmed), trimmed)


def matches(texts: pa.StringArray, pattern: str) -> Flags:
    """Return which texts match the pattern."""
    return _flags(pc.match_substring_regex(texts, pattern))


def _flags(values: pa.BooleanArray) -> Flags:
    return np.array(values.to_numpy(zero_copy_only=False), dtype=bool)


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type are texts, or bytes that are read as texts."""
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type are lists."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def is_integer(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type are whole numbers by their type."""
    return bool(pa.types.is_integer(kind))


def _stored(values: pa.Array) -> pa.Array:
    """Return the values without an extension type; UUIDs become texts."""
    if not isinstance(values, pa.ExtensionArray):
        return values
    if str(values.type).startswith("extension<arrow.uuid"):
        return pa.array([None if each is None else str(UUID(bytes=each)) for each in values.storage.to_pylist()])
    return values.storage


def _texts(values: pa.Array, cast: Cast | None) -> tuple[pa.StringArray, Flags]:
    """Return values as texts, null where one is null or invalid, and which are not invalid."""
    kind = values.type
    everything = np.ones(len(values), dtype=bool)
    if pa.types.is_null(kind):
        return pa.nulls(len(values), pa.string()), everything
    if is_text(kind):
        return _decoded(values)
    if is_integer(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.string()), everything
    if pa.types.is_floating(kind):
        return _texts_of_floats(values, cast)
    if pa.types.is_decimal(kind):
        texts = values.cast(pa.string())
        if cast == "text":
            return texts, everything
        whole = matches(texts.fill_null("0"), INTEGER)
        return pc.if_else(pa.array(whole), _whole_numbers(texts), pa.scalar(None, pa.string())), whole
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_date(kind):
        if cast == "integer":
            return pa.nulls(len(values), pa.string()), np.zeros(len(values), dtype=bool)
        if pa.types.is_date64(kind):
            values = values.cast(pa.date32(), safe=False)
        return _texts_of_times(values.cast(pa.string())), everything
    return pa.nulls(len(values), pa.string()), values.is_null().to_numpy(zero_copy_only=False)


def _decoded(values: pa.Array) -> tuple[pa.StringArray, Flags]:
    """Return texts, or bytes as texts; bytes that are not UTF-8 are invalid."""
    try:
        return values.cast(pa.string()), np.ones(len(values), dtype=bool)
    except pa.ArrowInvalid:
        pass
    texts: list[str | None] = []
    valid = np.ones(len(values), dtype=bool)
    for row, value in enumerate(values.cast(pa.binary()).to_pylist()):
        try:
            texts.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(None)
            valid[row] = False
    return pa.array(texts, pa.string()), valid


def _texts_of_floats(values: pa.Array, cast: Cast | None) -> tuple[pa.StringArray, Flags]:
    if cast == "text":
        # The shortest text that reads as the same number, as pandas writes it; per distinct number.
        encoded = values.dictionary_encode()
        scalar = {pa.float16(): np.float16, pa.float32(): np.float32}.get(values.type, np.float64)
        shown = pa.array([None if x is None else str(scalar(x)) for x in encoded.dictionary.to_pylist()], pa.string())
        return shown.take(encoded.indices), np.ones(len(values), dtype=bool)
    numbers = values.cast(pa.float64()).fill_null(0).to_numpy()
    whole = (numbers == np.trunc(numbers)) & (np.abs(numbers) <= _EXACT)  # excludes NaN
    digits = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    shown = whole & values.is_valid().to_numpy(zero_copy_only=False)
    return pc.if_else(pa.array(shown), digits, pa.scalar(None, pa.string())), whole


def _texts_of_times(texts: pa.StringArray) -> pa.StringArray:
    """Return Arrow's texts of times, whatever their unit: a fraction only if it is not 0, zones as +01:00."""
    zone = r"(Z|[+-][0-9]{4})?$"
    texts = pc.replace_substring_regex(texts, r"\.0+" + zone, r"\1")
    texts = pc.replace_substring_regex(texts, r"(\.[0-9]{6})000" + zone, r"\1\2")
    texts = pc.replace_substring_regex(texts, r"(\.[0-9]{3})" + zone, r"\1000\2")
    texts = pc.replace_substring_regex(texts, r"Z$", "+00:00")
    return pc.replace_substring_regex(texts, r"([:0-9]{2}[+-][0-9]{2})([0-9]{2})$", r"\1:\2")


def _whole_numbers(texts: pa.StringArray) -> pa.StringArray:
    """Return whole numbers that match ``INTEGER`` without a plus sign, leading zeros, and zeros after the point."""
    shortened = pc.replace_substring_regex(texts, r"^\+?(-?)0*([0-9]+?)(\.0*)?$", r"\1\2")
    return pc.if_else(pc.equal(shortened, "-0"), "0", shortened)


def _is_in(texts: pa.StringArray, values: Sequence[str]) -> Flags:
    found = _flags(pc.less_equal(pc.binary_length(texts), max(len(each.encode()) for each in values)))
    short = np.flatnonzero(found)  # all but a few values are longer than every spelling
    if len(short):
        found[short] = _flags(pc.is_in(texts.take(pa.array(short)), value_set=_array_of(tuple(values))))
    return found


@cache
def _array_of(values: tuple[str, ...]) -> pa.StringArray:
    return pa.array(values, pa.string())
