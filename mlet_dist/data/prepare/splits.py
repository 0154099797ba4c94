"""The assignment of rows to splits: by position, by a time column, at random, or by file.

A ``SplitRule`` becomes a ``Splitter`` once all files are read, when the number of rows, and so each row's number, is
known. The assignment of whole files is in ``split_files``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlet_dist.data.hashing import hash_counters
from mlet_dist.data.schema import SPLITS

# The kinds of times in a column, and the unit of numbers with a fraction (module ``time_columns``).
WHOLE_NUMBERS, FRACTIONS, DATES = "whole numbers", "numbers with a fraction", "dates or times"
MILLIONTHS = 1_000_000
MAX_FRACTION = (2**63 - 1) // MILLIONTHS  # the largest number that fits

Codes = npt.NDArray[np.uint8]  # index into SPLITS

EIGHTY_TEN_TEN = {"train": Fraction(8, 10), "valid": Fraction(1, 10), "test": Fraction(1, 10)}
HALVES = {"test": Fraction(1, 2), "valid": Fraction(1, 2)}


@dataclass(frozen=True)
class SplitRule:
    """The rule by which rows are assigned to splits.

    Attributes:
        by: ``rows`` cuts all rows, in the order of the files, into consecutive shares. ``time`` does so in the order of
            ``column``, with rows of equal time in the same split; or it cuts at the times ``starts``. ``random`` draws
            each row's split from the seed and the row's number. ``file`` gives each file to one split: those of
            ``files``, or train; without ``files`` it cuts the last file into ``shares``.
        shares: the share of each split, in the order of the splits' rows; they add up to 1. A split without a share has
            no rows.
        seed: seed of ``random``.
        column: the raw column with the times, for ``time``.
        starts: for ``time``, in place of shares: the first time of valid, of test, or of both; earlier rows are train.
        starts_are_dates: whether ``starts`` were given as dates or times; they are microseconds since 1970 then.
        files: for ``file``, in place of shares: names or patterns of the raw files of each split.
    """

    by: Literal["rows", "time", "random", "file"]
    shares: Mapping[str, Fraction] = field(default_factory=lambda: dict(EIGHTY_TEN_TEN))
    seed: int = 0
    column: str | None = None
    starts: Mapping[str, int | float] | None = None
    starts_are_dates: bool = False
    files: Mapping[str, tuple[str, ...]] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the rule makes."""
        if self.by == "file":
            made = {"train", *(self.shares if self.files is None else self.files)}
        else:
            made = set(self.shares) if self.starts is None else {"train", *self.starts}
        return tuple(split for split in SPLITS if split in made)


# The splits of the MLET paper. Criteo-Kaggle has 7 days in time order and no time column. The first half of the last
# day is the test split, as in the code of the paper's baselines.
PAPER_CRITEO_ROWS = SplitRule("rows", {"train": Fraction(6, 7), "test": Fraction(1, 14), "valid": Fraction(1, 14)})
PAPER_CRITEO_FILES = SplitRule("file", HALVES)
PAPER_AVAZU = SplitRule("random")


def whole(split: str) -> SplitRule:
    """Return the rule that gives all rows to one split."""
    return SplitRule("rows", {split: Fraction(1)})


@dataclass(frozen=True)
class Splitter:
    """A split rule, applied to files whose numbers of rows are known.

    Attributes:
        rule: the rule.
        file_rows: number of rows of each file.
        file_splits: for ``file``, the split of each file; None for the file that is cut into shares.
        cuts: for ``time``, the ascending times at which splits start: a row is in ``names[i]`` if i of them are at or
            before its time.
        names: for ``time``, the splits in time order.
        in_millionths: for ``time``, whether times are numbers in millionths (``time_columns``).
    """

    rule: SplitRule
    file_rows: tuple[int, ...]
    file_splits: tuple[str | None, ...] = ()
    cuts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    in_millionths: bool = False

    def codes(self, file: int, start: int, rows: int, times: npt.NDArray[np.int64] | None) -> Codes:
        """Return the split codes of rows ``[start, start + rows)`` of a file; a rule by time needs their ``times``."""
        first = sum(self.file_rows[:file]) + start
        if self.rule.by == "time":
            assert times is not None
            return _codes_of(self.names)[np.searchsorted(np.array(self.cuts, np.int64), times, side="right")]
        if self.rule.by == "random":
            bounds = [min(int(share * 2**64), 2**64 - 1) for share in accumulate(self.rule.shares.values())][:-1]
            random = hash_counters(self.rule.seed, first, rows)
            return _codes_of(self.rule.shares)[np.searchsorted(np.array(bounds, np.uint64), random, side="right")]
        if self.rule.by == "file":
            if (split := self.file_splits[file]) is not None:
                return np.full(rows, SPLITS.index(split), np.uint8)
            return self._by_position(start, rows, self.file_rows[file])
        return self._by_position(first, rows, sum(self.file_rows))

    def _by_position(self, first: int, rows: int, total: int) -> Codes:
        bounds = [total * share // 1 for share in accumulate(self.rule.shares.values())]
        positions = np.arange(first, first + rows)
        return _codes_of(self.rule.shares)[np.searchsorted(np.array(bounds, np.int64), positions, side="right")]


def make_splitter(
    rule: SplitRule,
    file_rows: Sequence[int],
    times: Sequence[npt.NDArray[np.int64]] = (),
    in_millionths: bool = False,
    file_splits: Sequence[str | None] = (),
) -> Splitter:
    """Return the splitter of files with ``file_rows`` rows.

    Args:
        rule: the rule.
        file_rows: number of rows of each file.
        times: for shares by time, the times in any order.
        in_millionths: whether the times are numbers in millionths (``time_columns``).
        file_splits: for ``file``, as in ``Splitter``.
    """
    rows = tuple(file_rows)
    if rule.by != "time":
        return Splitter(rule, rows, tuple(file_splits))
    if rule.starts is not None:
        ordered = sorted(rule.starts.items(), key=lambda item: item[1])
        unit = MILLIONTHS if in_millionths else 1
        cuts = tuple(ceil(Fraction(str(time)) * unit) for _, time in ordered)
        return Splitter(rule, rows, (), cuts, ("train", *(name for name, _ in ordered)), in_millionths)
    total = sum(rows)
    ranks = [total * share // 1 for share in accumulate(rule.shares.values())][:-1]
    cuts = tuple(_order_statistic(times, min(rank, total - 1)) for rank in ranks)
    return Splitter(rule, rows, (), cuts, tuple(rule.shares), in_millionths)


def _order_statistic(arrays: Sequence[npt.NDArray[np.int64]], rank: int) -> int:
    """Return the number at position ``rank`` (from 0 on) of all arrays' numbers in ascending order, in constant memory.

    Each pass over the arrays, which are read from disk, narrows the range of the number to 1 / 2^16.
    """
    ends = [(int(array.min()), int(array.max())) for array in arrays if array.size]
    low, high = min(least for least, _ in ends), max(most for _, most in ends)
    while low < high:
        shift = np.uint64(max(0, (high - low).bit_length() - 16))
        counts = np.zeros(1 << 16, np.int64)
        for array in arrays:
            inside = array[(array >= low) & (array <= high)].astype(np.uint64)
            # Modulo 2^64, since the range may be wider than int64.
            buckets = (inside - np.uint64(low % 2**64)) >> shift
            counts += np.bincount(buckets.astype(np.int64), minlength=len(counts))
        bucket = int(np.searchsorted(np.cumsum(counts), rank, side="right"))
        rank -= int(counts[:bucket].sum())
        low += bucket << int(shift)
        high = min(high, low + (1 << int(shift)) - 1)
    return low


def _codes_of(names: Sequence[str] | Mapping[str, Fraction]) -> Codes:
    return np.array([SPLITS.index(name) for name in names], np.uint8)
