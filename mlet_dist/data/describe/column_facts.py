"""What the first rows show of a column: distinct values, missing ones, and whether the values are numbers."""

import re
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.prepare.raw_values import INTEGER, MISSING_NUMBERS, as_numbers, as_texts, is_list, is_text, matches
from mlet_dist.errors import one_line

# Spellings of a missing value in a column of texts; these others of MISSING_NUMBERS may well be values there.
_MISSING_TEXTS = frozenset(MISSING_NUMBERS) - {"", "-", "--", ".", "missing", "unknown"}
RECBOLE_TYPE = re.compile(r":(token|float)(_seq)?$")  # the end of a column's name in RecBole's atomic files
_MAX_ODD = 2  # texts among numbers that are taken for spellings of a missing value
_MOST_ODD = 0.3  # the largest share of rows that hold them
_SHOWN_CHARACTERS = 24
_SHOWN_VALUES = 3

Counts = npt.NDArray[np.int64]


class ColumnFacts:
    """A column of the first rows.

    Attributes:
        name: name of the column; it may be empty.
        values: (rows,) its values, of any Arrow type but dictionary.
        in_path: whether it is a directory ``key=value``; then there is a value for each raw file.
    """

    def __init__(self, name: str, values: pa.Array, in_path: bool = False) -> None:
        self.name, self.in_path = name, in_path
        self.values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values

    @property
    def rows(self) -> int:
        """Number of values, missing ones included."""
        return len(self.values)

    @cached_property
    def is_list(self) -> bool:
        """Whether the values are lists by their Arrow type."""
        return is_list(self.values.type)

    @cached_property
    def is_readable(self) -> bool:
        """Whether the values have a reading as texts, such as numbers, times and UUIDs; structs and maps do not."""
        if self.is_list or pa.types.is_struct(self.values.type):
            return False
        sample = as_texts(self.values, "text", ())[2]
        return bool(sample.all() if pa.types.is_null(self.values.type) or not self.rows else sample.any())

    @property
    def is_text(self) -> bool:
        """Whether the values are texts, or bytes that are read as texts."""
        return is_text(self.values.type)

    @cached_property
    def encoded(self) -> pa.Array:
        """The values as ``mlet prepare`` gets them: those of a text file are a dictionary."""
        return self.values.dictionary_encode() if pa.types.is_string(self.values.type) else self.values

    @cached_property
    def _distinct(self) -> tuple[pa.StringArray, npt.NDArray[np.bool_], Counts]:
        """The distinct values as texts, which of them are neither null, empty nor NaN, and their numbers of rows."""
        encoded = as_texts(self.values, "text", ())[0].dictionary_encode()
        texts = encoded.dictionary
        present = pc.not_equal(texts, "").to_numpy(zero_copy_only=False)
        return texts, present, np.bincount(encoded.indices.to_numpy(), minlength=len(texts))

    @cached_property
    def _reading(self) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.bool_], bool]:
        """The distinct values as numbers, if they are; which are not missing; whether there are odd spellings."""
        texts, present, counts = self._distinct
        lower = np.array([text.strip().lower() for text in texts.to_pylist()], dtype=object)
        spelled = np.isin(lower, list(MISSING_NUMBERS)) & present if len(lower) else present
        numbers, _ = as_numbers(texts, False, ())
        is_number = np.isfinite(numbers)
        values = present & ~spelled
        odd = values & ~is_number
        if values.any() and not pa.types.is_boolean(self.values.type):
            if not odd.any():
                return numbers, values, False
            is_word = all(not any(c.isdigit() for c in str(texts[int(i)])) for i in np.flatnonzero(odd)[: _MAX_ODD + 1])
            few = odd.sum() <= _MAX_ODD and counts[odd].sum() <= _MOST_ODD * counts[values].sum()
            if few and is_word and (values & is_number).sum() > 10 * _MAX_ODD:
                return numbers, values & is_number, True
        missing_texts = np.array([text in _MISSING_TEXTS for text in lower], dtype=bool) & present
        return None, present & ~missing_texts, False

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        """The spellings of missing values that occur, besides the empty text."""
        if not self.is_text:
            return ()
        texts, present, _ = self._distinct
        _, values, _ = self._reading
        return tuple(sorted(texts.filter(pa.array(present & ~values)).to_pylist()))

    @property
    def has_odd_spellings(self) -> bool:
        """Whether a spelling is taken for missing only since it stands among numbers."""
        return self._reading[2]

    @property
    def is_number(self) -> bool:
        """Whether all values that are not missing are numbers."""
        return self._reading[0] is not None

    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """The numbers of all rows that have one, in ascending order."""
        numbers, values, _ = self._reading
        if numbers is None:
            return np.zeros(0)
        return np.sort(np.repeat(numbers[values], self._distinct[2][values]))

    @cached_property
    def is_whole(self) -> bool:
        """Whether all numbers are whole."""
        return self.is_number and bool((self.numbers == np.trunc(self.numbers)).all())

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of rows of each value that is not missing, from the most frequent to the rarest."""
        texts, _, counts = self._distinct
        chosen = np.flatnonzero(self._reading[1])
        order = chosen[np.argsort(-counts[chosen], kind="stable")]
        return dict(zip(texts.take(pa.array(order)).to_pylist(), counts[order].tolist(), strict=True))

    @property
    def present(self) -> int:
        """Number of rows with a value."""
        return sum(self.counts.values())

    @property
    def missing_share(self) -> float:
        """Share of rows without a value."""
        return 1 - self.present / self.rows if self.rows else 0.0

    @cached_property
    def has_points(self) -> bool:
        """Whether whole numbers are written with a point, such as 7.0."""
        return self.is_whole and any("." in text for text in self.counts)

    @cached_property
    def has_leading_zeros(self) -> bool:
        """Whether texts of digits begin with a zero, as codes do and numbers do not."""
        if not self.is_text:
            return False
        texts = self._distinct[0]
        return bool((matches(texts, r"^[+-]?0[0-9]") & matches(texts, INTEGER)).any())

    def examples(self) -> str:
        """Return the most frequent values, or the range of numbers with a fraction, for a comment."""
        if self.is_number and not self.is_whole:
            return f"{self.numbers[0]:.6g} to {self.numbers[-1]:.6g}"
        texts = [shown(text) for text in list(self.counts)[:_SHOWN_VALUES]]
        return ", ".join(texts)


def shown(text: str) -> str:
    """Return a value for a comment: on one line, and not too long."""
    text = one_line(text)
    text = text if text == text.strip() and text else repr(text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
