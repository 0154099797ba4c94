"""Raw columns become typed ones: each function takes a column and says which rows are wrong, and why.

A raw column is a dictionary of texts (of a text file), or any Arrow array (of a Parquet file). A text is looked at once
a block, however many rows hold it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn

INTEGER = r"^-?[0-9]{1,18}$"
NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_ZONED = r":[0-9.]*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"  # an ISO 8601 time that names its zone
FLOAT32_MAX = float(np.finfo(np.float32).max)

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Typed:
    """A column, with something in the place of what is wrong, and why that is wrong, by row."""

    values: pa.Array
    wrong: dict[int, str]


@dataclass(frozen=True)
class TypedTimes(Typed):
    """Times, and the rows whose time is a whole number; that of the others is a date or a time."""

    whole: Flags


def label_values(raw: pa.Array, label: LabelColumn) -> Typed:
    """int8, 0 or 1."""
    if label.positive_from is not None:
        numbers, absent, shown = _numbers(raw, integer=False)
        fits, expected = np.isfinite(numbers) & ~absent, "a number"
        values = (numbers >= label.positive_from).astype(np.int8)
    elif pa.types.is_boolean(raw.type):
        shown, expected = raw, "true or false"
        fits = ~raw.is_null().to_numpy(zero_copy_only=False)
        values = raw.fill_null(False).cast(pa.int8()).to_numpy()
    else:
        numbers, absent, shown = _numbers(raw, integer=True)
        fits, expected = ((numbers == 0) | (numbers == 1)) & ~absent, "0 or 1"
        values = np.where(fits, numbers, 0).astype(np.int8)
    return _result(raw, pa.array(values), fits, shown, label.column, expected)


def time_values(raw: pa.Array, name: str) -> TypedTimes:
    """int64: whole numbers as they are; dates and times, of whatever type, and ISO 8601 texts in microseconds."""
    shown = _distinct(raw)
    if _is_text(shown.type):
        texts = shown.cast(pa.string()).fill_null("")
        whole = _matches(texts, INTEGER)
        values = np.zeros(len(texts), np.int64)
        values[whole] = texts.filter(pa.array(whole)).cast(pa.int64()).to_numpy()
        fits = whole.copy()
        zoned = _matches(texts, _ZONED)
        for rows, kind in ((~whole & ~zoned, pa.timestamp("us")), (~whole & zoned, pa.timestamp("us", "UTC"))):
            values[rows], fits[rows] = _cast_times(texts.filter(pa.array(rows)), kind)
        typed = _result(raw, pa.array(values), fits, shown, name, "a whole number or an ISO 8601 time")
        return TypedTimes(
            typed.values, typed.wrong, whole[_indices(raw)] if pa.types.is_dictionary(raw.type) else whole
        )
    whole = np.full(len(raw), pa.types.is_integer(shown.type))
    if pa.types.is_integer(shown.type) or pa.types.is_timestamp(shown.type) or pa.types.is_date(shown.type):
        fits = ~shown.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_timestamp(shown.type) or pa.types.is_date(shown.type):
            shown = shown.cast(pa.timestamp("us"), safe=False)  # files may differ in their unit
        typed = _result(raw, shown.cast(pa.int64(), safe=False).fill_null(0), fits, shown, name, "a time")
    else:
        typed = _all_wrong(raw, pa.array(np.zeros(len(raw), np.int64)), name, "a whole number or a time")
    return TypedTimes(typed.values, typed.wrong, whole)


def dense_values(raw: pa.Array, dense: DenseColumn) -> Typed:
    """float32, transformed; of a column to standardise float64 as it is, null where the mean is to come."""
    numbers, absent, shown = _numbers(raw, dense.integer)
    expected = "an integer" if dense.integer else f"a number from {-FLOAT32_MAX:.4g} to {FLOAT32_MAX:.4g}"
    fits = np.abs(numbers) <= FLOAT32_MAX  # neither NaN nor infinite either
    refuse = dense.missing == "refuse"
    fits = fits & ~absent if refuse else fits | absent
    stand_in = dense.missing if isinstance(dense.missing, float) else 0.0
    numbers = np.where(absent | ~fits, stand_in, numbers)
    if dense.transform == "standardise":
        return _result(
            raw, pa.array(numbers, mask=absent & (dense.missing == "mean")), fits, shown, dense.column, expected
        )
    if dense.transform == "log1p":
        numbers = np.log1p(np.maximum(numbers, 0))
    return _result(raw, pa.array(numbers.astype(np.float32)), fits, shown, dense.column, expected)


def value_texts(raw: pa.Array, sparse: SparseColumn) -> Typed:
    """A dictionary of texts, int32 indices; integers by their decimal digits, what is missing by the empty text."""
    if not _has_texts(raw.type):
        empty = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(raw), np.int32)), [""])
        return _all_wrong(raw, empty, sparse.column, "a text or a whole number")
    shown = _distinct(raw)
    texts = shown.cast(pa.string()).fill_null("")
    if not sparse.integer:
        return Typed(_encoded(texts, raw), {})
    texts, fits = _canonical(texts)
    result = _result(raw, texts, fits, shown, sparse.column, "a whole number")
    return Typed(result.values.dictionary_encode(), result.wrong)


def list_values(raw: pa.Array, sparse: SparseColumn) -> Typed:
    """Lists of a dictionary of texts."""
    if sparse.separator is not None:
        shown = _distinct(raw)
        flat, offsets = _pieces(shown, sparse.separator)
    elif pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        shown = raw
        flat, offsets = raw.flatten(), _offsets(raw.value_lengths().fill_null(0))
        if not _has_texts(flat.type):
            return _all_wrong(raw, _empty_lists(len(raw)), sparse.column, "a list of texts or whole numbers")
        flat = (flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat).cast(pa.string()).fill_null("")
    else:
        return _all_wrong(raw, _empty_lists(len(raw)), sparse.column, "a list")
    fits = np.ones(len(shown), dtype=bool)
    if sparse.integer:
        flat, good = _canonical(flat, optional=False)
        fits[np.searchsorted(offsets, np.flatnonzero(~good), side="right") - 1] = False
    lists = pa.ListArray.from_arrays(pa.array(offsets), flat.dictionary_encode())
    return _result(raw, lists, fits, shown, sparse.column, "whole numbers")


def weight_lists(raw: pa.Array, sparse: SparseColumn, lists: Typed) -> Typed:
    """Lists of float32, as long as those of the values."""
    assert sparse.weights is not None
    if sparse.separator is not None:
        shown = _distinct(raw)
        flat, offsets = _pieces(shown, sparse.separator)
    elif pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        shown = raw
        flat, offsets = raw.flatten(), _offsets(raw.value_lengths().fill_null(0))
    else:
        return _all_wrong(raw, _empty_lists(len(raw), pa.float32()), sparse.weights, "a list of numbers")
    numbers, absent, _ = _numbers(flat, integer=False)
    good = (np.abs(numbers) <= FLOAT32_MAX) & ~absent
    fits = np.ones(len(shown), dtype=bool)
    fits[np.searchsorted(offsets, np.flatnonzero(~good), side="right") - 1] = False
    weights = pa.array(np.where(good, numbers, 0).astype(np.float32))
    result = _result(raw, pa.ListArray.from_arrays(pa.array(offsets), weights), fits, shown, sparse.weights, "numbers")
    found, wanted = (_lengths(each.values) for each in (result, lists))
    wrong = dict(result.wrong)
    for row in np.flatnonzero(found != wanted):
        wrong.setdefault(
            int(row), f"{sparse.weights} has {found[row]} weights for {wanted[row]} values of {sparse.column}"
        )
    return Typed(result.values, wrong)


def _cast_times(texts: pa.StringArray, kind: pa.DataType) -> tuple[npt.NDArray[np.int64], Flags]:
    """The times in microseconds, and which texts are times; all at once, or halved where some are not."""
    try:
        return texts.cast(kind).cast(pa.int64()).to_numpy(), np.ones(len(texts), dtype=bool)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return np.zeros(1, np.int64), np.zeros(1, dtype=bool)
    halves = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    values, fits = zip(*(_cast_times(half, kind) for half in halves), strict=True)
    return np.concatenate(values), np.concatenate(fits)


def _numbers(raw: pa.Array, integer: bool) -> tuple[npt.NDArray[np.float64], Flags, pa.Array]:
    """The distinct values as float64, NaN where they are no numbers; which are absent; and the values to show."""
    shown = _distinct(raw)
    if _is_text(shown.type):
        texts = shown.cast(pa.string()).fill_null("")
        fits = _matches(texts, INTEGER if integer else NUMBER)
        numbers = np.full(len(texts), np.nan)
        numbers[fits] = texts.filter(pa.array(fits)).cast(pa.float64()).to_numpy()
        return numbers, pc.equal(texts, "").to_numpy(zero_copy_only=False), shown
    absent = shown.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(shown.type):
        shown = shown.cast(pa.int8())
    if not (pa.types.is_integer(shown.type) or pa.types.is_floating(shown.type) or pa.types.is_decimal(shown.type)):
        return np.full(len(shown), np.nan), np.zeros(len(shown), dtype=bool), shown
    numbers = shown.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
    if integer:
        numbers = np.where(numbers == np.trunc(numbers), numbers, np.nan)
    return numbers, absent, shown


def _pieces(texts: pa.Array, separator: str) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
    """The pieces of all texts, one after the other, and where those of each text begin; an empty text has none."""
    texts = texts.cast(pa.string()).fill_null("")
    lists = pc.split_pattern(texts, separator)
    lengths = lists.value_lengths().to_numpy()
    empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
    flat = lists.flatten().filter(pa.array(np.repeat(~empty, lengths)))
    return flat, _offsets(np.where(empty, 0, lengths))


def _canonical(texts: pa.StringArray, optional: bool = True) -> tuple[pa.StringArray, Flags]:
    """Whole numbers without leading zeros; the empty text stays where it may."""
    fits = _matches(texts, INTEGER)
    whole = pc.if_else(pa.array(fits), texts, "0").cast(pa.int64()).cast(pa.string())
    if optional:
        empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
        whole, fits = pc.if_else(pa.array(empty), "", whole), fits | empty
    return whole, fits


def _result(raw: pa.Array, values: pa.Array, fits: Flags, shown: pa.Array, name: str, expected: str) -> Typed:
    """The column of rows, from what is known of each distinct value."""
    wrong_of_row = ~fits
    if pa.types.is_dictionary(raw.type):
        rows = _indices(raw)
        values = values.take(pa.array(rows))
        if fits.all():
            return Typed(values, {})
        wrong_of_row = ~fits[rows]
        return Typed(values, {int(r): _why(name, shown[int(rows[r])], expected) for r in np.flatnonzero(wrong_of_row)})
    return Typed(values, {int(r): _why(name, shown[int(r)], expected) for r in np.flatnonzero(wrong_of_row)})


def _all_wrong(raw: pa.Array, values: pa.Array, name: str, expected: str) -> Typed:
    reason = f"{name} is of type {raw.type} instead of {expected}"
    return Typed(values, dict.fromkeys(range(len(raw)), reason))


def _why(name: str, value: pa.Scalar, expected: str) -> str:
    text = value.as_py()
    shown = repr(text)
    if isinstance(text, str) and len(text) > 20:
        shown = repr(text[:20] + "…")
    return f"{name} is {shown:.60} instead of {expected}"


def _distinct(raw: pa.Array) -> pa.Array:
    """The values of a dictionary, at its end the null that rows without a value stand for; or the column itself."""
    if not pa.types.is_dictionary(raw.type):
        return raw
    return pa.concat_arrays([raw.dictionary, pa.nulls(1, raw.dictionary.type)]) if raw.null_count else raw.dictionary


def _indices(raw: pa.DictionaryArray) -> npt.NDArray[np.int64]:
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
