"""Conversion of raw columns to typed columns of labels, numbers and single categories.

A raw column is a dictionary of texts (from a text file) or any Arrow array (from a Parquet file). The functions convert
each distinct value of a dictionary once, however many rows hold it, and return which rows are invalid, and why.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn
from mlet_dist.data.prepare.raw_values import Flags, as_numbers, as_texts, canonical_texts

FLOAT32_MAX = float(np.finfo(np.float32).max)

_LIBM_ERROR = 2.0**-50  # the largest relative one of a logarithm in float64
_DIGITS = 100  # for the smallest numbers, whose logarithm is about the number itself

Rows = npt.NDArray[np.int64]

_SHOWN_CHARACTERS = 40  # of an invalid value, such as a time with the name of its zone
_SHOWN_LABELS = 5  # distinct labels other than 0 and 1 that are counted by value


class InvalidRows(Mapping[int, str]):
    """Why rows are invalid, by row. A reason is made when it is asked for, since millions of rows may be invalid.

    Args:
        rows: the invalid rows, ascending.
        explain: returns the reason of one of them.
    """

    def __init__(self, rows: Rows, explain: Callable[[int], str]) -> None:
        self.rows, self._explain = rows, explain

    def __getitem__(self, row: int) -> str:
        if row not in self:
            raise KeyError(row)
        return self._explain(row)

    def __contains__(self, row: object) -> bool:
        place = int(np.searchsorted(self.rows, row))  # type: ignore[call-overload]
        return place < len(self.rows) and bool(self.rows[place] == row)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows.tolist())

    def __len__(self) -> int:
        return len(self.rows)


NONE_INVALID = InvalidRows(np.zeros(0, np.int64), str)


@dataclass(frozen=True)
class TypedColumn:
    """A typed column with arbitrary values in invalid rows.

    Attributes:
        values: (rows,) the values.
        invalid: why rows are invalid.
        counts: what was left out or noticed, as the number of values by kind (``list_columns``); of labels, those of
            ``positive`` and ``negative`` that occur.
    """

    values: pa.Array
    invalid: InvalidRows
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TypedLabels(TypedColumn):
    """A column of labels (int8, 0 or 1; null where a row may lack the label, and does).

    Attributes:
        others: how many rows hold a number other than 0 and 1, by its text; empty if the description maps the labels.
    """

    others: dict[str, int] = field(default_factory=dict)


def label_values(raw: pa.Array, label: LabelColumn) -> TypedLabels:
    """Return labels: int8, 0 or 1. Without a mapping, 0, 1, 0.0, 1.0, false and true (in any case) are labels."""
    distinct = distinct_values(raw)
    others: dict[str, int] = {}
    listed: dict[str, int] = {}
    if label.positive is not None:
        texts, absent, known = as_texts(distinct, None, label.missing_values)
        texts = canonical_texts(texts)
        positive = _is_in(texts, label.positive)
        listed = {each: 1 for each in (*label.positive, *(label.negative or ())) if _is_in(texts, (each,)).any()}
        valid = known & ~absent
        expected = "one value"
        if label.negative is not None:
            valid &= positive | _is_in(texts, label.negative)
            expected = "one of label.positive and label.negative"
        values = positive.astype(np.int8)
    else:
        numbers, absent = as_numbers(distinct, integer=False, missing_values=label.missing_values)
        numbers = _with_booleans(numbers, distinct, absent)
        if label.positive_from is not None:
            valid, expected = np.isfinite(numbers) & ~absent, "a number"
            values = (numbers >= label.positive_from).astype(np.int8)
        else:
            is_label = (numbers == 0) | (numbers == 1)
            valid, expected = is_label & ~absent, "0 or 1"
            values = np.where(valid, numbers, 0).astype(np.int8)
            others = _counted(raw, distinct, np.isfinite(numbers) & ~is_label & ~absent)
    unknown = absent if label.missing == "unknown" else None
    if unknown is not None:
        valid = valid | unknown
    typed = typed_column(raw, pa.array(values, mask=unknown), valid, distinct, label.column, expected)
    return TypedLabels(typed.values, typed.invalid, listed, others)


def dense_values(raw: pa.Array, dense: DenseColumn) -> TypedColumn:
    """Return transformed numbers (float32); for ``standardise`` raw ones (float64), null where the mean goes."""
    distinct = distinct_values(raw)
    numbers, absent = as_numbers(distinct, dense.integer, dense.missing_values)
    numbers = _with_booleans(numbers, distinct, absent)
    expected = "an integer" if dense.integer else f"a number from {-FLOAT32_MAX:.4g} to {FLOAT32_MAX:.4g}"
    valid = np.abs(numbers) <= FLOAT32_MAX  # excludes NaN and infinities
    refuse = dense.missing == "refuse"
    valid = valid & ~absent if refuse else valid | absent
    stand_in = dense.missing if isinstance(dense.missing, float) else 0.0
    numbers = np.where(absent | ~valid, stand_in, numbers)
    if dense.transform == "standardise":
        return typed_column(
            raw, pa.array(numbers, mask=absent & (dense.missing == "mean")), valid, distinct, dense.column, expected
        )
    values = log1p_float32(numbers) if dense.transform == "log1p" else numbers.astype(np.float32)
    return typed_column(raw, pa.array(values), valid, distinct, dense.column, expected)


def log1p_float32(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return log(1 + max(x, 0)), rounded to the nearest float32, which is the same on every machine.

    The last bits of a float64 logarithm are not. They matter where it is about halfway between two float32 numbers:
    then more digits decide. Exports carry two more implementations, for servers (``raw_rows.py`` and ``raw_rows.h``).
    """
    numbers = np.maximum(numbers, 0) + 0.0  # never -0.0
    wide = np.log1p(numbers)
    low, high = ((wide * (1 + error)).astype(np.float32) for error in (-_LIBM_ERROR, _LIBM_ERROR))
    with localcontext(prec=_DIGITS):
        for place in np.flatnonzero(low != high):
            halfway = (float(low[place]) + float(high[place])) / 2
            if (Decimal(float(numbers[place])) + 1).ln() > Decimal(halfway):
                low[place] = high[place]
    return low


def sample_weights(raw: pa.Array, column: str) -> TypedColumn:
    """Return the weights of rows: float32, 0 or more; a missing one is invalid."""
    distinct = distinct_values(raw)
    numbers, absent = as_numbers(distinct, integer=False, missing_values=None)
    valid = (numbers >= 0) & (numbers <= FLOAT32_MAX) & ~absent
    values = pa.array(np.where(valid, numbers, 0).astype(np.float32))
    return typed_column(raw, values, valid, distinct, column, "a weight, 0 or more")


def value_texts(raw: pa.Array, sparse: SparseColumn) -> TypedColumn:
    """Return a dictionary of texts with int32 indices; integers as decimal digits, missing values as the empty text."""
    distinct = distinct_values(raw)
    texts, _, valid = as_texts(distinct, sparse.cast, sparse.missing_values)
    if valid.all():
        return TypedColumn(_encoded(texts, raw), NONE_INVALID)
    result = typed_column(raw, texts, valid, distinct, sparse.column, expected_category(sparse.cast))
    return TypedColumn(result.values.dictionary_encode(), result.invalid)


def expected_category(cast: str | None) -> str:
    """Return what a categorical value must be, for messages."""
    if cast == "text":
        return "a text, a number, a boolean, a date or a time"
    if cast == "integer":
        return "a whole number"
    return "a text, a whole number, a boolean, a date or a time (`cast: text` takes any number)"


def typed_column(
    raw: pa.Array, values: pa.Array, valid: Flags, distinct: pa.Array, name: str, expected: str
) -> TypedColumn:
    """Return the typed column of all rows, given the value and validity of each of the ``distinct`` raw values."""
    if not pa.types.is_dictionary(raw.type):
        invalid = InvalidRows(np.flatnonzero(~valid), lambda row: reason(name, distinct[row], expected))
        return TypedColumn(values, invalid)
    rows = row_indices(raw)
    values = values.take(pa.array(rows))
    if valid.all():
        return TypedColumn(values, NONE_INVALID)
    invalid = InvalidRows(np.flatnonzero(~valid[rows]), lambda row: reason(name, distinct[int(rows[row])], expected))
    return TypedColumn(values, invalid)


def all_invalid(raw: pa.Array, values: pa.Array, name: str, expected: str) -> TypedColumn:
    """Return a typed column whose rows are all invalid, since the column is of another type."""
    text = f"{name} is of type {raw.type} instead of {expected}"
    return TypedColumn(values, InvalidRows(np.arange(len(raw)), lambda _: text))


def reason(name: str, value: pa.Scalar, expected: str) -> str:
    """Return why a value is invalid."""
    try:
        content = value.as_py()
    except (ValueError, OverflowError):  # what Python's types do not hold, such as times with nanoseconds
        content = str(value)
    shown = repr(content)
    if isinstance(content, str) and len(content) > _SHOWN_CHARACTERS:
        shown = repr(content[:_SHOWN_CHARACTERS] + "…")
    if not isinstance(content, str | int | float | None):
        return f"{name} is {shown:.60}, of type {value.type}, instead of {expected}"
    return f"{name} is {shown:.60} instead of {expected}"


def distinct_values(raw: pa.Array) -> pa.Array:
    """Return a dictionary's values, followed by a null if rows are null; or any other column itself."""
    if not pa.types.is_dictionary(raw.type):
        return raw
    return pa.concat_arrays([raw.dictionary, pa.nulls(1, raw.dictionary.type)]) if raw.null_count else raw.dictionary


def row_indices(raw: pa.DictionaryArray) -> npt.NDArray[np.int64]:
    """Return each row's index into ``distinct_values(raw)``."""
    return raw.indices.cast(pa.int64()).fill_null(len(raw.dictionary)).to_numpy()


def _encoded(texts: pa.StringArray, raw: pa.Array) -> pa.DictionaryArray:
    if not pa.types.is_dictionary(raw.type):
        return texts.dictionary_encode()
    if raw.null_count:
        return texts.take(pa.array(row_indices(raw))).dictionary_encode()
    return pa.DictionaryArray.from_arrays(raw.indices.cast(pa.int32()), texts)


def _is_in(texts: pa.StringArray, values: Sequence[str]) -> Flags:
    wanted = canonical_texts(pa.array(list(values), pa.string()))
    return np.array(pc.is_in(texts, value_set=wanted).to_numpy(zero_copy_only=False), dtype=bool)


def _with_booleans(numbers: npt.NDArray[np.float64], distinct: pa.Array, absent: Flags) -> npt.NDArray[np.float64]:
    """Return the numbers with 0 and 1 in place of the texts false and true, unless those are missing values."""
    if not (np.isnan(numbers) & ~absent).any():
        return numbers
    texts, _, _ = as_texts(distinct, None, None)
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    for text, number in (("false", 0.0), ("true", 1.0)):
        found = pc.equal(lower, text).to_numpy(zero_copy_only=False)
        numbers = np.where(found & ~absent, number, numbers)
    return numbers


def _counted(raw: pa.Array, distinct: pa.Array, chosen: Flags) -> dict[str, int]:
    """Return how many rows hold each of the chosen distinct values, by its text; of many values, a few."""
    if not chosen.any():
        return {}
    rows = row_indices(raw) if pa.types.is_dictionary(raw.type) else np.arange(len(raw))
    texts, _, _ = as_texts(distinct, "text", None)
    found = pc.value_counts(texts.take(pa.array(rows[chosen[rows]]))).to_pylist()
    counts = {str(each["values"]): int(each["counts"]) for each in found}
    shown = dict(sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN_LABELS])
    rest = sum(counts.values()) - sum(shown.values())
    return shown | ({"other values": rest} if rest else {})
