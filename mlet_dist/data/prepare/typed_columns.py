"""Conversion of raw columns to typed columns; each function also returns which rows are invalid, and why.

A raw column is a dictionary of texts (from a text file) or any Arrow array (from a Parquet file). The functions convert
each distinct text of a dictionary once, however many rows hold it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn

INTEGER = r"^-?[0-9]{1,18}$"
NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_ZONED = r":[0-9.]*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"  # an ISO 8601 time with a time zone
FLOAT32_MAX = float(np.finfo(np.float32).max)

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TypedColumn:
    """A typed column with arbitrary values in invalid rows.

    Attributes:
        values: (rows,) the values.
        invalid: the reason why a row is invalid, by row.
    """

    values: pa.Array
    invalid: dict[int, str]


@dataclass(frozen=True)
class TypedTimes(TypedColumn):
    """A column of times (int64).

    Attributes:
        is_integer: (rows,) whether a time was given as a whole number rather than a date or time.
    """

    is_integer: Flags


def label_values(raw: pa.Array, label: LabelColumn) -> TypedColumn:
    """Return labels: int8, 0 or 1."""
    if label.positive_from is not None:
        numbers, absent, distinct = _numbers(raw, integer=False)
        valid, expected = np.isfinite(numbers) & ~absent, "a number"
        values = (numbers >= label.positive_from).astype(np.int8)
    elif pa.types.is_boolean(raw.type):
        distinct, expected = raw, "true or false"
        valid = ~raw.is_null().to_numpy(zero_copy_only=False)
        values = raw.fill_null(False).cast(pa.int8()).to_numpy()
    else:
        numbers, absent, distinct = _numbers(raw, integer=True)
        valid, expected = ((numbers == 0) | (numbers == 1)) & ~absent, "0 or 1"
        values = np.where(valid, numbers, 0).astype(np.int8)
    return _result(raw, pa.array(values), valid, distinct, label.column, expected)


def time_values(raw: pa.Array, name: str) -> TypedTimes:
    """Return times: whole numbers unchanged; dates, timestamps and ISO 8601 texts as microseconds since 1970."""
    distinct = _distinct(raw)
    if _is_text(distinct.type):
        texts = distinct.cast(pa.string()).fill_null("")
        is_integer = _matches(texts, INTEGER)
        values = np.zeros(len(texts), np.int64)
        values[is_integer] = texts.filter(pa.array(is_integer)).cast(pa.int64()).to_numpy()
        valid = is_integer.copy()
        zoned = _matches(texts, _ZONED)
        for rows, kind in (
            (~is_integer & ~zoned, pa.timestamp("us")),
            (~is_integer & zoned, pa.timestamp("us", "UTC")),
        ):
            values[rows], valid[rows] = _cast_times(texts.filter(pa.array(rows)), kind)
        typed = _result(raw, pa.array(values), valid, distinct, name, "a whole number or an ISO 8601 time")
        return TypedTimes(
            typed.values, typed.invalid, is_integer[_indices(raw)] if pa.types.is_dictionary(raw.type) else is_integer
        )
    is_integer = np.full(len(raw), pa.types.is_integer(distinct.type))
    if pa.types.is_integer(distinct.type) or pa.types.is_timestamp(distinct.type) or pa.types.is_date(distinct.type):
        valid = ~distinct.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_timestamp(distinct.type) or pa.types.is_date(distinct.type):
            distinct = distinct.cast(pa.timestamp("us"), safe=False)  # the unit may differ between files
        typed = _result(raw, distinct.cast(pa.int64(), safe=False).fill_null(0), valid, distinct, name, "a time")
    else:
        typed = _all_invalid(raw, pa.array(np.zeros(len(raw), np.int64)), name, "a whole number or a time")
    return TypedTimes(typed.values, typed.invalid, is_integer)


def dense_values(raw: pa.Array, dense: DenseColumn) -> TypedColumn:
    """Return transformed numbers (float32); for ``standardise`` raw ones (float64), null where the mean goes."""
    numbers, absent, distinct = _numbers(raw, dense.integer)
    expected = "an integer" if dense.integer else f"a number from {-FLOAT32_MAX:.4g} to {FLOAT32_MAX:.4g}"
    valid = np.abs(numbers) <= FLOAT32_MAX  # excludes NaN and infinities
    refuse = dense.missing == "refuse"
    valid = valid & ~absent if refuse else valid | absent
    stand_in = dense.missing if isinstance(dense.missing, float) else 0.0
    numbers = np.where(absent | ~valid, stand_in, numbers)
    if dense.transform == "standardise":
        return _result(
            raw, pa.array(numbers, mask=absent & (dense.missing == "mean")), valid, distinct, dense.column, expected
        )
    if dense.transform == "log1p":
        numbers = np.log1p(np.maximum(numbers, 0))
    return _result(raw, pa.array(numbers.astype(np.float32)), valid, distinct, dense.column, expected)


def value_texts(raw: pa.Array, sparse: SparseColumn) -> TypedColumn:
    """Return a dictionary of texts with int32 indices; integers as decimal digits, missing values as the empty text."""
    if not _has_texts(raw.type):
        empty = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(raw), np.int32)), [""])
        return _all_invalid(raw, empty, sparse.column, "a text or a whole number")
    distinct = _distinct(raw)
    texts = distinct.cast(pa.string()).fill_null("")
    if not sparse.integer:
        return TypedColumn(_encoded(texts, raw), {})
    texts, valid = _canonical_integers(texts)
    result = _result(raw, texts, valid, distinct, sparse.column, "a whole number")
    return TypedColumn(result.values.dictionary_encode(), result.invalid)


def list_values(raw: pa.Array, sparse: SparseColumn) -> TypedColumn:
    """Return lists of dictionary-encoded texts."""
    if sparse.separator is not None:
        distinct = _distinct(raw)
        flat, offsets = _split_texts(distinct, sparse.separator)
    elif pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        distinct = raw
        flat, offsets = raw.flatten(), _offsets(raw.value_lengths().fill_null(0))
        if not _has_texts(flat.type):
            return _all_invalid(raw, _empty_lists(len(raw)), sparse.column, "a list of texts or whole numbers")
        flat = (flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat).cast(pa.string()).fill_null("")
    else:
        return _all_invalid(raw, _empty_lists(len(raw)), sparse.column, "a list")
    valid = np.ones(len(distinct), dtype=bool)
    if sparse.integer:
        flat, valid_values = _canonical_integers(flat, optional=False)
        valid[np.searchsorted(offsets, np.flatnonzero(~valid_values), side="right") - 1] = False
    lists = pa.ListArray.from_arrays(pa.array(offsets), flat.dictionary_encode())
    return _result(raw, lists, valid, distinct, sparse.column, "whole numbers")


def weight_lists(raw: pa.Array, sparse: SparseColumn, lists: TypedColumn) -> TypedColumn:
    """Return lists of float32 weights; a row is invalid if its list is not as long as that of ``lists``."""
    assert sparse.weights is not None
    if sparse.separator is not None:
        distinct = _distinct(raw)
        flat, offsets = _split_texts(distinct, sparse.separator)
    elif pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        distinct = raw
        flat, offsets = raw.flatten(), _offsets(raw.value_lengths().fill_null(0))
    else:
        return _all_invalid(raw, _empty_lists(len(raw), pa.float32()), sparse.weights, "a list of numbers")
    numbers, absent, _ = _numbers(flat, integer=False)
    valid_values = (np.abs(numbers) <= FLOAT32_MAX) & ~absent
    valid = np.ones(len(distinct), dtype=bool)
    valid[np.searchsorted(offsets, np.flatnonzero(~valid_values), side="right") - 1] = False
    weights = pa.array(np.where(valid_values, numbers, 0).astype(np.float32))
    result = _result(
        raw, pa.ListArray.from_arrays(pa.array(offsets), weights), valid, distinct, sparse.weights, "numbers"
    )
    found, wanted = (_lengths(each.values) for each in (result, lists))
    invalid = dict(result.invalid)
    for row in np.flatnonzero(found != wanted):
        invalid.setdefault(
            int(row), f"{sparse.weights} has {found[row]} weights for {wanted[row]} values of {sparse.column}"
        )
    return TypedColumn(result.values, invalid)


def _cast_times(texts: pa.StringArray, kind: pa.DataType) -> tuple[npt.NDArray[np.int64], Flags]:
    """Return the times in microseconds, and which texts are times; others are found by bisection."""
    try:
        return texts.cast(kind).cast(pa.int64()).to_numpy(), np.ones(len(texts), dtype=bool)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return np.zeros(1, np.int64), np.zeros(1, dtype=bool)
    halves = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    values, valid = zip(*(_cast_times(half, kind) for half in halves), strict=True)
    return np.concatenate(values), np.concatenate(valid)


def _numbers(raw: pa.Array, integer: bool) -> tuple[npt.NDArray[np.float64], Flags, pa.Array]:
    """Return the distinct values as float64 (NaN if not a number), which are missing, and the values themselves."""
    distinct = _distinct(raw)
    if _is_text(distinct.type):
        texts = distinct.cast(pa.string()).fill_null("")
        valid = _matches(texts, INTEGER if integer else NUMBER)
        numbers = np.full(len(texts), np.nan)
        numbers[valid] = texts.filter(pa.array(valid)).cast(pa.float64()).to_numpy()
        return numbers, pc.equal(texts, "").to_numpy(zero_copy_only=False), distinct
    absent = distinct.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(distinct.type):
        distinct = distinct.cast(pa.int8())
    if not (
        pa.types.is_integer(distinct.type) or pa.types.is_floating(distinct.type) or pa.types.is_decimal(distinct.type)
    ):
        return np.full(len(distinct), np.nan), np.zeros(len(distinct), dtype=bool), distinct
    numbers = distinct.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
    if integer:
        numbers = np.where(numbers == np.trunc(numbers), numbers, np.nan)
    return numbers, absent, distinct


def _split_texts(texts: pa.Array, separator: str) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
    """Split texts; return all parts, and the offsets of each text's parts. An empty text has no parts."""
    texts = texts.cast(pa.string()).fill_null("")
    lists = pc.split_pattern(texts, separator)
    lengths = lists.value_lengths().to_numpy()
    empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
    flat = lists.flatten().filter(pa.array(np.repeat(~empty, lengths)))
    return flat, _offsets(np.where(empty, 0, lengths))


def _canonical_integers(texts: pa.StringArray, optional: bool = True) -> tuple[pa.StringArray, Flags]:
    """Return whole numbers without leading zeros, and which texts are valid; ``optional`` keeps empty texts."""
    valid = _matches(texts, INTEGER)
    digits = pc.if_else(pa.array(valid), texts, "0").cast(pa.int64()).cast(pa.string())
    if optional:
        empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
        digits, valid = pc.if_else(pa.array(empty), "", digits), valid | empty
    return digits, valid


def _result(raw: pa.Array, values: pa.Array, valid: Flags, distinct: pa.Array, name: str, expected: str) -> TypedColumn:
    """Return the typed column of all rows, given the value and validity of each distinct raw value."""
    invalid_rows = ~valid
    if pa.types.is_dictionary(raw.type):
        rows = _indices(raw)
        values = values.take(pa.array(rows))
        if valid.all():
            return TypedColumn(values, {})
        invalid_rows = ~valid[rows]
        return TypedColumn(
            values, {int(r): _reason(name, distinct[int(rows[r])], expected) for r in np.flatnonzero(invalid_rows)}
        )
    return TypedColumn(
        values, {int(r): _reason(name, distinct[int(r)], expected) for r in np.flatnonzero(invalid_rows)}
    )


def _all_invalid(raw: pa.Array, values: pa.Array, name: str, expected: str) -> TypedColumn:
    reason = f"{name} is of type {raw.type} instead of {expected}"
    return TypedColumn(values, dict.fromkeys(range(len(raw)), reason))


def _reason(name: str, value: pa.Scalar, expected: str) -> str:
    text = value.as_py()
    shown = repr(text)
    if isinstance(text, str) and len(text) > 20:
        shown = repr(text[:20] + "…")
    return f"{name} is {shown:.60} instead of {expected}"


def _distinct(raw: pa.Array) -> pa.Array:
    """Return a dictionary's values, followed by a null if rows are null; or any other column itself."""
    if not pa.types.is_dictionary(raw.type):
        return raw
    return pa.concat_arrays([raw.dictionary, pa.nulls(1, raw.dictionary.type)]) if raw.null_count else raw.dictionary


def _indices(raw: pa.DictionaryArray) -> npt.NDArray[np.int64]:
    """Return each row's index into ``_distinct(raw)``."""
    return raw.indices.cast(pa.int64()).fill_null(len(raw.dictionary)).to_numpy()


def _encoded(texts: pa.StringArray, raw: pa.Array) -> pa.DictionaryArray:
    if not pa.types.is_dictionary(raw.type):
        return texts.dictionary_encode()
    if raw.null_count:
        return texts.take(pa.array(_indices(raw))).dictionary_encode()
    return pa.DictionaryArray.from_arrays(raw.indices.cast(pa.int32()), texts)


def _matches(texts: pa.StringArray, pattern: str) -> Flags:
    return np.array(pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False), dtype=bool)


def _offsets(lengths: npt.NDArray[np.int32] | pa.Array) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths))]).astype(np.int32)


def _lengths(lists: pa.ListArray) -> npt.NDArray[np.int32]:
    lengths: npt.NDArray[np.int32] = lists.value_lengths().to_numpy()
    return lengths


def _empty_lists(rows: int, kind: pa.DataType | None = None) -> pa.ListArray:
    values = pa.array([], kind) if kind is not None else pa.array([], pa.string()).dictionary_encode()
    return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), values)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _has_texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or pa.types.is_integer(kind)
