"""Which split a row belongs to: by its position, by a time column, at random, or by its file.

A rule is resolved once all files are read, when the number of rows, and with it each row's number, is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlet_dist.data.hashing import hash_counters
from mlet_dist.data.schema import SPLITS

Codes = npt.NDArray[np.uint8]  # index into SPLITS

EIGHTY_TEN_TEN = {"train": Fraction(8, 10), "valid": Fraction(1, 10), "test": Fraction(1, 10)}
HALVES = {"test": Fraction(1, 2), "valid": Fraction(1, 2)}


@dataclass(frozen=True)
class SplitRule:
    """How rows are split.

    Attributes:
        by: ``rows``: consecutive shares of all rows in the order of the files; ``time``: the same in the order of
            ``column``, rows of one time never apart, or by the times where a split ``starts``; ``random``: each row by
            itself, by seed and row number; ``file``: the last file is cut into ``shares``, all others are train.
        shares: of the splits, in their order; they add up to 1.
        seed: of ``random``.
        column: of ``time``.
        starts: of ``time``, in place of shares: first time of valid and test; what is before both is train.
    """

    by: Literal["rows", "time", "random", "file"]
    shares: Mapping[str, Fraction] = field(default_factory=lambda: dict(EIGHTY_TEN_TEN))
    seed: int = 0
    column: str | None = None
    starts: Mapping[str, int] | None = None


# The paper's: Criteo-Kaggle has 7 days in time order and no time column. The last day's first half is the test split,
# as in the programs that the paper compares with.
PAPER_CRITEO_ROWS = SplitRule("rows", {"train": Fraction(6, 7), "test": Fraction(1, 14), "valid": Fraction(1, 14)})
PAPER_CRITEO_FILES = SplitRule("file", HALVES)
PAPER_AVAZU = SplitRule("random")


@dataclass(frozen=True)
class Splitter:
    """A rule with all that is known of the rows.

    Attributes:
        rule: what is resolved.
        file_rows: rows of each file.
        cuts: of ``time``: a row belongs to ``names[i]`` if ``i`` of them are at or before its time.
        names: the splits in the order of their shares or starts.
    """

    rule: SplitRule
    file_rows: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def codes(self, file: int, start: int, rows: int, times: npt.NDArray[np.int64] | None) -> Codes:
        """The splits of rows ``[start, start + rows)`` of a file, whose times are given if the rule asks for them."""
        first = sum(self.file_rows[:file]) + start
        if self.rule.by == "time":
            assert times is not None
            return _codes_of(self.names)[np.searchsorted(np.array(self.cuts, np.int64), times, side="right")]
        if self.rule.by == "random":
            bounds = [min(int(share * 2**64), 2**64 - 1) for share in accumulate(self.rule.shares.values())][:-1]
            random = hash_counters(self.rule.seed, first, rows)
            return _codes_of(self.rule.shares)[np.searchsorted(np.array(bounds, np.uint64), random, side="right")]
        if self.rule.by == "file":
            if file < len(self.file_rows) - 1:
                return np.full(rows, SPLITS.index("train"), np.uint8)
            return self._by_position(start, rows, self.file_rows[file])
        return self._by_position(first, rows, sum(self.file_rows))

    def _by_position(self, first: int, rows: int, total: int) -> Codes:
        bounds = [total * share // 1 for share in accumulate(self.rule.shares.values())]
        positions = np.arange(first, first + rows)
        return _codes_of(self.rule.shares)[np.searchsorted(np.array(bounds, np.int64), positions, side="right")]


def resolve(rule: SplitRule, file_rows: Sequence[int], times: Sequence[npt.NDArray[np.int64]] = ()) -> Splitter:
    """The splitter of files with so many rows; ``times``, in pieces and any order, if the rule cuts shares of time."""
    if rule.by != "time":
        return Splitter(rule, tuple(file_rows))
    if rule.starts is not None:
        ordered = sorted(rule.starts.items(), key=lambda item: item[1])
        return Splitter(rule, tuple(file_rows), tuple(time for _, time in ordered), ("train", *(n for n, _ in ordered)))
    total = sum(file_rows)
    ranks = [total * share // 1 for share in accumulate(rule.shares.values())][:-1]
    cuts = tuple(_smallest(times, min(rank, total - 1)) for rank in ranks)
    return Splitter(rule, tuple(file_rows), cuts, tuple(rule.shares))


def _smallest(pieces: Sequence[npt.NDArray[np.int64]], rank: int) -> int:
    """The number that has ``rank`` smaller or equal ones before it in order; memory does not grow with the numbers.

    Each look at all of them narrows its range to a part in 2^16: looking is what takes time, as they lie on disk.
    """
    ends = [(int(piece.min()), int(piece.max())) for piece in pieces if piece.size]
    low, high = min(least for least, _ in ends), max(most for _, most in ends)
    while low < high:
        shift = np.uint64(max(0, (high - low).bit_length() - 16))
        counts = np.zeros(1 << 16, np.int64)
        for piece in pieces:
            inside = piece[(piece >= low) & (piece <= high)].astype(np.uint64)
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
