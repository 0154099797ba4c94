"""Columns of lists: their separator, brackets and weights, guessed from the values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.describe.column_facts import ColumnFacts
from mlet_dist.data.prepare.list_columns import list_values
from mlet_dist.data.prepare.raw_formats import SparseColumn
from mlet_dist.data.prepare.raw_values import NUMBER

# Signs that hardly occur in a single value, and those that do, which must separate short words or numbers.
_STRONG = ("\x02", "\x03", "\x1d", "|", "^", "::")
_WEAK = (",", ";", "#", "&", "$", "~", "@", "/", " ")
_LIST_NAME = re.compile(r"(token_seq|seq|list|hist|history|ids|tags|genres|categories|keywords|behaviou?rs?)$")
_WITH_DIGIT = re.compile(r"\S*[0-9]\S*")  # an identifier rather than a word
_WORD = re.compile(r"[\w.:=+-]+")
_IS_NUMBER = re.compile(NUMBER)
_PAIR_SIGNS = (":", "=", "@")

_LEAST_SHARE = 0.02  # of rows whose value holds the separator
_SAMPLE = 2_000  # distinct values to look at
_LONGEST = 64  # characters of a value within a list
_REUSE = 0.7  # the largest share of distinct values among all values of lists


@dataclass(frozen=True)
class ListGuess:
    """How the values of a column are lists.

    Attributes:
        keys: the keys of the feature that make lists of them; empty if the elements are numbers with a fraction,
            which may be the weights of another list, or the elements of a vector.
        lengths: (rows,) the number of elements of each row.
        note: what was seen, for a comment.
    """

    keys: dict[str, Any]
    lengths: npt.NDArray[np.int64]
    note: str


def guess_list(facts: ColumnFacts) -> ListGuess | None:
    """Return how the values are lists; None if they are not, or cannot be read as such."""
    if facts.is_list:
        return _arrow_lists(facts)
    if not facts.is_text or facts.is_number or not facts.present:
        return None
    sample = list(facts.counts)[:_SAMPLE]
    if all(re.fullmatch(r"\s*\[[^\[\]]*\]\s*", text) for text in sample):
        inner = [text.strip()[1:-1].strip() for text in sample]
        is_spaced = not any("," in text for text in inner) and any(len(text.split()) > 1 for text in inner)
        separator = " " if is_spaced else ","
        pieces = [piece.strip() for text in inner for piece in text.split(separator)]
        return _checked(facts, {"separator": separator}, [piece for piece in pieces if piece], "lists in brackets")
    total = sum(facts.counts[text] for text in sample)
    for separator in (*_STRONG, *_WEAK):
        share = sum(facts.counts[text] for text in sample if separator in text) / total
        if share < _LEAST_SHARE:
            continue
        lists = [[piece for piece in text.split(separator) if piece] for text in sample]
        if _are_lists(facts.name, lists, separator):
            longer = [", " if separator == "," and all(", " in text for text in sample if "," in text) else separator]
            note = f"{share:.0%} of the rows hold the separator"
            return _checked(facts, {"separator": longer[0]}, [piece.strip() for each in lists for piece in each], note)
    return None


def _are_lists(name: str, lists: Sequence[Sequence[str]], separator: str) -> bool:
    """Return whether the pieces of texts are values that occur in other rows and at other places, too."""
    pieces = [piece.strip() for each in lists for piece in each]
    if not pieces or max(map(len, pieces)) > _LONGEST:
        return False
    keys = [_without_weight(piece) for piece in pieces]
    is_named = _LIST_NAME.search(name.lower()) is not None
    first = {_without_weight(each[0].strip()) for each in lists if len(each) > 1}
    later = {_without_weight(piece.strip()) for each in lists for piece in each[1:]}
    mixed = len(first & later) > 0.1 * min(len(first), len(later))  # the parts of a date or a path are not
    if separator in _STRONG:
        return mixed or is_named
    if not all(_WORD.fullmatch(piece) for piece in pieces) and not is_named:
        return False
    if separator in (" ", "/", "@") and not (is_named or all(_WITH_DIGIT.fullmatch(key) for key in keys)):
        return False
    if len({len(each) for each in lists}) == 1 and not is_named:
        return False
    return mixed and (is_named or len(set(keys)) <= _REUSE * len(keys))


def _without_weight(piece: str) -> str:
    return re.sub(r"[:=@][+-]?[0-9.]+$", "", piece)


def _checked(facts: ColumnFacts, keys: dict[str, Any], pieces: Sequence[str], note: str) -> ListGuess | None:
    """Return the guess if ``mlet prepare`` reads every row so; with the sign between values and weights, if any."""
    present = [piece for piece in pieces if piece.lower() not in ("nan", "none", "null", "")]
    for sign in _PAIR_SIGNS:
        if present and all(_is_pair(piece, sign) for piece in present):
            weighted = keys | {"weight_separator": sign}
            if (lengths := _lengths(facts, weighted)) is not None:
                return ListGuess(weighted, lengths, f"{note}; each element is a value and its weight")
    lengths = _lengths(facts, keys)
    if lengths is None:
        return None
    numbers = [piece for piece in present if _IS_NUMBER.match(piece)]
    if len(numbers) == len(present) and any(re.search(r"\.[0-9]*[1-9]|[eE]-", piece) for piece in numbers):
        return ListGuess({}, lengths, "lists of numbers with a fraction")
    return ListGuess(keys, lengths, note)


def _is_pair(piece: str, sign: str) -> bool:
    value, found, weight = piece.strip("'\"").rpartition(sign)
    return found != "" and value != "" and _IS_NUMBER.match(weight) is not None


def _lengths(facts: ColumnFacts, keys: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """Return the number of values of each row; None if ``mlet prepare`` would find a row malformed."""
    multi = {"multi_valued": True}
    lists, _ = list_values(facts.encoded, None, SparseColumn(facts.name, facts.name, **(multi | keys)))
    if lists.invalid:
        return None
    return np.asarray(lists.values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _arrow_lists(facts: ColumnFacts) -> ListGuess | None:
    """Return the guess for lists by their Arrow type."""
    elements = facts.values.flatten()
    lengths = pc.list_value_length(facts.values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    inner = ColumnFacts(facts.name, elements)
    if inner.is_list or not inner.is_readable:
        return None
    if pa.types.is_floating(elements.type) or pa.types.is_decimal(elements.type):
        if inner.present and not inner.is_whole:
            return ListGuess({}, lengths, "lists of numbers with a fraction")
    elif inner.is_text and inner.present:
        for sign in _PAIR_SIGNS:
            if all(_is_pair(text, sign) for text in inner.counts):
                keys = {"multi_valued": True, "weight_separator": sign}
                return ListGuess(keys, lengths, "lists whose elements are a value and its weight")
        if inner.is_number and not inner.is_whole:  # JSON
            return ListGuess({}, lengths, "lists of numbers with a fraction")
    found, _ = list_values(facts.values, None, SparseColumn(facts.name, facts.name, multi_valued=True))
    return None if found.invalid else ListGuess({"multi_valued": True}, lengths, f"lists of {elements.type}")
