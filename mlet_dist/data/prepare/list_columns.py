"""Conversion of raw columns of lists, with or without weights, to typed columns.

Lists come as Arrow lists, as texts that are split at a separator, and as texts in brackets, which pandas and JSON
write: ``[27, 9]`` is 27 and 9. An empty or missing element is no value: it is left out, with its weight, and counted.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_formats import SparseColumn
from mlet_dist.data.prepare.raw_values import Flags, as_numbers, as_texts, is_integer, is_list, is_text, matches
from mlet_dist.data.prepare.typed_columns import (
    FLOAT32_MAX,
    NONE_INVALID,
    InvalidRows,
    TypedColumn,
    all_invalid,
    distinct_values,
    row_indices,
    typed_column,
)

# Keys of ``TypedColumn.counts``.
EMPTY = "empty"  # elements that were left out since they are empty or missing
BEYOND = "beyond"  # values that were left out since a list has more than max_len
SPLIT = "split"  # rows whose text was split, so that it has two elements or more

Lengths = npt.NDArray[np.int64]

_BRACKETS = r"^\[[^\[\]]*\]$"
# Elements without commas between them, as NumPy writes lists: what they are, and what is between them.
_SPACED = (
    (r"^[0-9.eE+-]+(\s+[0-9.eE+-]+)+$", r"\s+", ","),
    (r"^'[^']*'(\s+'[^']*')+$", r"'\s+'", "','"),
)
_QUOTED = r"""^('.*'|".*")$"""
_HALF_QUOTED = r"""^(['"].*[^'"]|['"]|[^'"].*['"])$"""


@dataclass(frozen=True)
class _Elements:
    """The elements of lists.

    Attributes:
        flat: the elements of all lists, not dictionary-encoded.
        lengths: the number of elements of each list.
        readable: whether each list could be split into elements.
    """

    flat: pa.Array
    lengths: Lengths
    readable: Flags

    def owners(self) -> npt.NDArray[np.int64]:
        """Return the list that each element belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def list_values(
    raw: pa.Array, raw_weights: pa.Array | None, sparse: SparseColumn
) -> tuple[TypedColumn, TypedColumn | None]:
    """Return lists of dictionary-encoded texts, and the lists of their float32 weights if the feature has weights."""
    if sparse.weighted and pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()  # weights differ between rows of the same values
    distinct = distinct_values(raw)
    elements = _elements(distinct, sparse)
    if elements is None:
        empty_lists = _empty_lists(len(raw), pa.dictionary(pa.int32(), pa.string()))
        lists = all_invalid(raw, empty_lists, sparse.column, "a list, or a text that `separator` splits")
        return lists, _empty_weights(len(raw)) if sparse.weighted else None
    rows = row_indices(raw) if pa.types.is_dictionary(raw.type) else np.arange(len(raw))
    flat, pair_weights = elements.flat, None
    valid = elements.readable.copy()
    if sparse.weight_separator is not None:
        flat, pair_weights, has_weight = _pairs(flat, sparse.weight_separator)
        valid[elements.owners()[~has_weight]] = False
    texts, absent, known = as_texts(flat, sparse.cast, sparse.missing_values)
    owners = elements.owners()
    valid[owners[~known]] = False
    kept = ~absent
    if sparse.max_len is not None:
        kept = _within(kept, elements.lengths, sparse.max_len, sparse.keep)
    lengths = np.bincount(owners[kept], minlength=len(distinct))
    offsets = _offsets(lengths)
    values = texts.filter(pa.array(kept)).dictionary_encode()
    arrays = pa.ListArray.from_arrays(pa.array(offsets), values)
    result = typed_column(raw, arrays, valid, distinct, sparse.column, _expected(distinct, sparse))
    empty = np.bincount(owners[absent], minlength=len(distinct))[rows].sum()
    counts = {
        EMPTY: int(empty),
        BEYOND: int((elements.lengths - lengths)[rows].sum() - empty),
        SPLIT: int((elements.lengths > 1)[rows].sum()),
    }
    lists = TypedColumn(result.values, result.invalid, counts)
    if pair_weights is not None:
        return lists, _typed_weights(raw, pair_weights, _Elements(flat, elements.lengths, valid), kept, sparse)
    if raw_weights is not None:
        return lists, _weight_lists(raw_weights, elements, ~absent, kept, sparse)
    return lists, None


def _weight_lists(raw: pa.Array, elements: _Elements, present: Flags, kept: Flags, sparse: SparseColumn) -> TypedColumn:
    """Return the weights of a column of their own; a row with another number of weights than values is invalid.

    Args:
        raw: the column of weights.
        elements: the elements of the feature's lists, one list a row.
        present: whether each of them is a value, neither empty nor missing.
        kept: which of them stay.
        sparse: the feature.
    """
    assert sparse.weights is not None
    if pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()
    found = _elements(raw, sparse)
    if found is None:
        return all_invalid(raw, _empty_lists(len(raw), pa.float32()), sparse.weights, "a list of numbers")
    numbers, absent = as_numbers(found.flat, integer=False, missing_values=None)
    # A weight belongs to the value at its place. Lists of other lengths may differ in empty elements alone, such as
    # a separator at the end; without them the places must be the same.
    values = np.bincount(elements.owners()[present], minlength=len(raw))
    weights = np.bincount(found.owners()[~absent], minlength=len(raw))
    same_place = found.lengths == elements.lengths
    wrong = ~same_place & (values != weights)
    chosen = np.where(same_place[found.owners()], False, ~absent)
    chosen[same_place[found.owners()]] = present[same_place[elements.owners()]]
    chosen &= ~wrong[found.owners()]
    present = present & ~wrong[elements.owners()]
    numbers = numbers[chosen]  # one for each present value
    valid = found.readable.copy()
    valid[found.owners()[chosen][~(np.abs(numbers) <= FLOAT32_MAX)]] = False
    kept_numbers = numbers[kept[present]]
    lengths = np.bincount(elements.owners()[kept & present], minlength=len(raw))
    lists = _lists_of(kept_numbers, lengths)
    result = typed_column(raw, lists, valid, raw, sparse.weights, "a list of numbers")

    def explain(row: int) -> str:
        if row in result.invalid:
            return result.invalid[row]
        return f"{sparse.weights} has {weights[row]} weights for {values[row]} values of {sparse.column}"

    invalid = InvalidRows(np.union1d(result.invalid.rows, np.flatnonzero(wrong)), explain)
    return TypedColumn(result.values, invalid)


def _typed_weights(
    raw: pa.Array, texts: pa.StringArray, elements: _Elements, kept: Flags, sparse: SparseColumn
) -> TypedColumn:
    """Return the weights of pairs of a value and a weight."""
    numbers, _ = as_numbers(texts, integer=False, missing_values=None)
    valid = elements.readable.copy()
    owners = elements.owners()
    valid[owners[kept][~(np.abs(numbers[kept]) <= FLOAT32_MAX)]] = False
    lists = _lists_of(numbers[kept], np.bincount(owners[kept], minlength=len(raw)))
    return typed_column(raw, lists, valid, raw, sparse.column, f"pairs such as a{sparse.weight_separator}0.5")


def _elements(lists: pa.Array, sparse: SparseColumn) -> _Elements | None:
    """Return the elements of the lists of an array; None if its type holds no lists."""
    if is_text(lists.type) or pa.types.is_null(lists.type):
        return _split_texts(lists, sparse.separator)
    if sparse.separator is not None and (is_integer(lists.type) or pa.types.is_floating(lists.type)):
        # A file whose rows all have one value: what wrote it took the texts for numbers.
        alone = lists.is_valid().to_numpy(zero_copy_only=False)
        return _Elements(lists.drop_null(), alone.astype(np.int64), np.ones(len(lists), dtype=bool))
    if not is_list(lists.type):
        return None
    lengths = pc.list_value_length(lists).fill_null(0).cast(pa.int64()).to_numpy()
    flat = lists.flatten()
    if pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_decode()
    return _Elements(flat, lengths, np.ones(len(lists), dtype=bool))


def _split_texts(raw: pa.Array, separator: str | None) -> _Elements:
    """Split texts at the separator, which is a comma for texts in brackets without one; an empty text has no parts.

    White space around elements is no part of them.
    """
    texts, _, decoded = as_texts(raw, "text", ())
    bracketed = matches(texts, r"\[")
    if bracketed.any():
        trimmed = pc.utf8_trim_whitespace(texts)
        bracketed = matches(trimmed, _BRACKETS)
        inner = pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(trimmed, 1, -1))
        for elements, between, comma in _SPACED if separator is None else ():
            if (spaced := matches(inner, elements)).any():
                inner = pc.if_else(pa.array(spaced), pc.replace_substring_regex(inner, between, comma), inner)
        shown = (separator or ",").strip()
        around = rf"\s*{re.escape(shown)}\s*" if shown else r"\s+"
        inner = pc.replace_substring_regex(inner, around, (separator or ",").replace("\\", "\\\\"))
        texts = pc.if_else(pa.array(bracketed), inner, texts)
    if separator is None:
        readable = bracketed | pc.equal(texts, "").to_numpy(zero_copy_only=False)
    else:
        readable = np.ones(len(texts), dtype=bool)
    pieces = pc.split_pattern(texts, separator or ",")
    lengths = pieces.value_lengths().to_numpy().astype(np.int64)
    empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)
    flat = pc.utf8_trim_whitespace(pieces.flatten().filter(pa.array(np.repeat(~empty, lengths))))
    lengths = np.where(empty, 0, lengths)
    if bracketed.any():
        inside = np.repeat(bracketed, lengths)
        owners = np.repeat(np.arange(len(texts)), lengths)
        cut = inside & matches(flat, _HALF_QUOTED)  # a quoted text that contains the separator
        readable = readable.copy()
        readable[owners[cut]] = False
        quoted = inside & matches(flat, _QUOTED)
        if quoted.any():
            flat = pc.if_else(pa.array(quoted), pc.utf8_slice_codeunits(flat, 1, -1), flat)
        # What pandas and JSON write of a missing element.
        missing = inside & ~quoted & matches(flat, r"^(None|null|nan|NaN|<NA>|NaT)$")
        flat = pc.if_else(pa.array(missing), "", flat)
    return _Elements(flat, lengths, readable & decoded)


def _pairs(flat: pa.Array, separator: str) -> tuple[pa.StringArray, pa.StringArray, Flags]:
    """Split each element at its last separator; return values, weights, and which have a weight or are empty."""
    texts, absent, _ = as_texts(flat, "text", ())
    parts = pc.split_pattern(texts, separator, max_splits=1, reverse=True)
    has_weight = parts.value_lengths().to_numpy() == 2
    pairs = pc.if_else(pa.array(has_weight), texts, separator)
    parts = pc.split_pattern(pairs, separator, max_splits=1, reverse=True)
    return pc.utf8_trim_whitespace(pc.list_element(parts, 0)), pc.list_element(parts, 1), has_weight | absent


def _within(present: Flags, lengths: Lengths, max_len: int, keep: str) -> Flags:
    """Return which of the present elements are among the first (or last) ``max_len`` of their list."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    of_list = np.bincount(owners[present], minlength=len(lengths))
    before = np.cumsum(of_list) - of_list
    place = np.cumsum(present) - 1 - before[owners]
    if keep == "last":
        place = of_list[owners] - 1 - place
    return present & (place < max_len)


def _expected(distinct: pa.Array, sparse: SparseColumn) -> str:
    """Return what a list must be, for messages."""
    if sparse.weight_separator is not None:
        return f"pairs such as a{sparse.weight_separator}0.5"
    elements = "whole numbers" if sparse.cast == "integer" else "texts or whole numbers"
    if sparse.separator is None and is_text(distinct.type):
        return f"a list of {elements} in brackets; set `separator` for other texts"
    return f"a list of {elements}"


def _lists_of(numbers: npt.NDArray[np.float64], lengths: Lengths) -> pa.ListArray:
    safe = np.where(np.abs(numbers) <= FLOAT32_MAX, numbers, 0).astype(np.float32)
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths)), pa.array(safe))


def _offsets(lengths: Lengths) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _empty_lists(rows: int, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), pa.array([], kind))


def _empty_weights(rows: int) -> TypedColumn:
    return TypedColumn(_empty_lists(rows, pa.float32()), NONE_INVALID)
