"""Conversion of a raw column of times to whole numbers that are ordered as the times are.

Numbers stay numbers. Dates, timestamps and texts of dates and times become microseconds since 1970 (UTC unless they
name a zone). Numbers with a fraction, such as seconds since 1970 with milliseconds, become millionths; a block that
holds one has all its numbers in millionths, and ``chunks.load_times`` converts the other blocks.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_values import INTEGER, NUMBER, Flags, as_texts, is_integer, is_text, matches
from mlet_dist.data.prepare.splits import DATES, FRACTIONS, MAX_FRACTION, MILLIONTHS, WHOLE_NUMBERS
from mlet_dist.data.prepare.typed_columns import TypedColumn, all_invalid, distinct_values, row_indices, typed_column

KINDS = (WHOLE_NUMBERS, FRACTIONS, DATES)

_ZONED = r":[0-9.]*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"  # an ISO 8601 time with a time zone
_EXPECTED = "a number, or a date or time such as 2020-07-05 05:27:48.378, 2020-07-05T05:27:48Z or 2020-07-05"


@dataclass(frozen=True)
class TypedTimes(TypedColumn):
    """A column of times (int64).

    Attributes:
        kinds: (rows,) the index into ``KINDS`` of each time.
    """

    kinds: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


def time_values(raw: pa.Array, name: str) -> TypedTimes:
    """Return times: whole numbers as they are, others in millionths, dates and times in microseconds since 1970."""
    distinct = distinct_values(raw)
    kind = distinct.type
    if is_text(kind):
        values, valid, kinds = _times_of_texts(distinct)
    elif is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values, valid, kinds = _times_of_numbers(distinct)
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        valid = distinct.is_valid().to_numpy(zero_copy_only=False)
        micros = distinct.cast(pa.timestamp("us"), safe=False).cast(pa.int64(), safe=False)
        values, kinds = micros.fill_null(0).to_numpy(), np.full(len(distinct), KINDS.index(DATES), np.uint8)
    else:
        zeros = pa.array(np.zeros(len(raw), np.int64))
        typed = all_invalid(raw, zeros, name, _EXPECTED)
        return TypedTimes(typed.values, typed.invalid, kinds=np.zeros(len(raw), np.uint8))
    rows = row_indices(raw) if pa.types.is_dictionary(raw.type) else np.arange(len(raw))
    used = np.zeros(len(distinct), dtype=bool)
    used[rows] = True
    if (kinds[used & valid] == KINDS.index(FRACTIONS)).any():
        whole = valid & (kinds == KINDS.index(WHOLE_NUMBERS))
        valid = valid & ~(whole & (np.abs(values) > MAX_FRACTION))
        values = np.where(whole & valid, values, 0) * MILLIONTHS + np.where(whole, 0, values)
        kinds = np.where(whole, np.uint8(KINDS.index(FRACTIONS)), kinds)
    typed = typed_column(raw, pa.array(values), valid, distinct, name, _EXPECTED)
    return TypedTimes(typed.values, typed.invalid, kinds=kinds[rows])


def parse_time(value: object) -> tuple[int | float, str]:
    """Return a time of the description as ``time_values`` returns it, and its kind; fractions stay numbers.

    Raises:
        ValueError: it is neither a number nor a date or time.
    """
    text = str(value)
    typed = time_values(pa.array([text]).dictionary_encode(), "starts")
    if typed.invalid:
        raise ValueError("numbers, or dates and times, as in the column")
    kind = KINDS[int(typed.kinds[0])]
    number = typed.values[0].as_py()
    return (number / MILLIONTHS if kind == FRACTIONS else number), kind


def _times_of_texts(distinct: pa.Array) -> tuple[npt.NDArray[np.int64], Flags, npt.NDArray[np.uint8]]:
    texts, absent, _ = as_texts(distinct, None, None)
    texts = pc.utf8_trim_whitespace(texts)
    values, valid = np.zeros(len(texts), np.int64), np.zeros(len(texts), dtype=bool)
    kinds = np.full(len(texts), KINDS.index(DATES), np.uint8)
    whole = matches(texts, INTEGER) & ~absent
    if whole.any():
        digits = pc.replace_substring_regex(texts.filter(pa.array(whole)), r"^\+|\.0*$", "")
        values[whole], valid[whole] = _cast(digits, pa.int64())
        kinds[whole] = KINDS.index(WHOLE_NUMBERS)
    fraction = matches(texts, NUMBER) & ~whole & ~absent
    if fraction.any():
        numbers = texts.filter(pa.array(fraction)).cast(pa.float64()).to_numpy()
        values[fraction], valid[fraction], kinds[fraction] = _scaled(numbers)
    dates = ~whole & ~fraction & ~absent
    if dates.any():
        iso = _iso(texts)
        zoned = matches(iso, _ZONED)
        for rows, kind in ((dates & ~zoned, pa.timestamp("us")), (dates & zoned, pa.timestamp("us", "UTC"))):
            values[rows], valid[rows] = _cast(iso.filter(pa.array(rows)), kind)
    return values, valid, kinds


def _times_of_numbers(distinct: pa.Array) -> tuple[npt.NDArray[np.int64], Flags, npt.NDArray[np.uint8]]:
    valid = distinct.is_valid().to_numpy(zero_copy_only=False)
    kinds = np.full(len(distinct), KINDS.index(WHOLE_NUMBERS), np.uint8)
    if is_integer(distinct.type):
        if pa.types.is_uint64(distinct.type):
            valid = valid & (distinct.fill_null(0).to_numpy() < 2**63)
        return distinct.cast(pa.int64(), safe=False).fill_null(0).to_numpy(), valid, kinds
    numbers = distinct.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
    whole = (numbers == np.trunc(numbers)) & (np.abs(numbers) < 2.0**63)
    values = np.where(whole, numbers, 0).astype(np.int64)
    values[~whole], in_range, kinds[~whole] = _scaled(numbers[~whole])
    valid = valid & ~np.isnan(numbers)
    valid[~whole] &= in_range
    return values, valid, kinds


def _scaled(numbers: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], Flags, npt.NDArray[np.uint8]]:
    """Return numbers in millionths, which of them fit, and their kinds; texts such as 1e3 are whole numbers."""
    valid = np.abs(numbers) <= MAX_FRACTION  # excludes NaN
    safe = np.where(valid, numbers, 0.0)
    whole = safe == np.trunc(safe)
    values = np.where(whole, safe, np.rint(safe * MILLIONTHS)).astype(np.int64)
    return values, valid, np.where(whole, KINDS.index(WHOLE_NUMBERS), KINDS.index(FRACTIONS)).astype(np.uint8)


def _iso(texts: pa.StringArray) -> pa.StringArray:
    """Return times as Arrow parses them: 2020/7/5 5:27:48.123456789 UTC becomes 2020-07-05 05:27:48.123456Z."""
    for pattern, by in (
        (r"^([0-9]{4})[/.]([0-9]{1,2})[/.]([0-9]{1,2})", r"\1-\2-\3"),
        (r"^([0-9]{4})-([0-9])-", r"\1-0\2-"),
        (r"^([0-9]{4}-[0-9]{2})-([0-9])([T ]|$)", r"\1-0\2\3"),
        (r"^([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]\s*([0-9]):", r"\1 0\2:"),
        (r"^([0-9]{4}-[0-9]{2}-[0-9]{2})t", r"\1T"),
        (r"(:[0-9]{2})[.,]([0-9]{1,6})[0-9]*", r"\1.\2"),  # nanoseconds are cut off
        (r"(:[0-9.]+)\s*(UTC|GMT|utc|z)$", r"\1Z"),
        (r"(:[0-9.]+)\s*(UTC|GMT)?([+-][0-9]{2}(:?[0-9]{2})?)$", r"\1\3"),
    ):
        texts = pc.replace_substring_regex(texts, pattern, by)
    return texts


def _cast(texts: pa.StringArray, kind: pa.DataType) -> tuple[npt.NDArray[np.int64], Flags]:
    """Return texts as int64 by way of a type, and which texts are of it; others are found by bisection."""
    try:
        return texts.cast(kind).cast(pa.int64()).to_numpy(), np.ones(len(texts), dtype=bool)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return np.zeros(1, np.int64), np.zeros(1, dtype=bool)
    halves = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    values, valid = zip(*(_cast(half, kind) for half in halves), strict=True)
    return np.concatenate(values), np.concatenate(valid)
