"""Columns of times, and how rows are split: in the order of a time, of the rows, or at random."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlet_dist.data.describe.column_facts import RECBOLE_TYPE, ColumnFacts, shown
from mlet_dist.data.describe.label_guess import LabelGuess
from mlet_dist.data.prepare.splits import FRACTIONS, MILLIONTHS, WHOLE_NUMBERS, SplitRule, make_splitter
from mlet_dist.data.prepare.time_columns import KINDS, time_values

_NAME = re.compile(
    r"(^|_)(time|times|timestamp|ts|date|datetime|day|dt|hour|unixtime|unix|created|at)(_|$)|time(stamp)?$"
)
# Seconds, milliseconds, microseconds and nanoseconds since 1970, of the years 1995 to 2040.
_EPOCHS = tuple((788_918_400 * unit, 2_208_988_800 * unit) for unit in (1, 10**3, 10**6, 10**9))
_SURE_NAME = re.compile(r"time_?stamp|unix")
_OTHER_TIMES = re.compile(r"birth|born|dob|release|expir")  # of persons and things rather than of rows
_LEAST_NAMED = 10_000  # smaller numbers, such as the hour of a day, are categories whatever their name
_SURE_DISTINCT = 20  # distinct numbers, more than a few codes have
_LEAST_DISTINCT = 0.3  # share of distinct times in a column of numbers whose name says nothing
_SAMPLE = 10  # distinct texts to look at before all are
_SEEDS = 100  # of random splits to try for one in which every split has both classes

_FEW_ROWS = 10  # fewer cannot be shared out among three splits


@dataclass(frozen=True)
class SplitGuess:
    """How rows are split.

    Attributes:
        keys: the keys of the section ``split``.
        note: how rows are split and why, for a comment.
        column: the column of times, if the split is by time.
    """

    keys: dict[str, Any]
    note: str
    column: str | None = None


def is_time(facts: ColumnFacts) -> bool:
    """Return whether the values are dates, times, or numbers that look like times."""
    if facts.is_list or not facts.present or not facts.is_readable or pa.types.is_boolean(facts.values.type):
        return False
    if pa.types.is_temporal(facts.values.type):
        return bool(pa.types.is_timestamp(facts.values.type) or pa.types.is_date(facts.values.type))
    if not facts.is_number:
        sample = pa.array(list(facts.counts)[:_SAMPLE]).dictionary_encode()
        return facts.is_text and not time_values(sample, facts.name).invalid and _times(facts) is not None
    low, high = facts.numbers[0], facts.numbers[-1]
    is_epoch = any(least <= low and high <= most for least, most in _EPOCHS)
    name = snake_case(facts.name)
    if _SURE_NAME.search(name) and facts.is_whole and len(facts.counts) > _SURE_DISTINCT:
        return True
    if _NAME.search(name):
        return bool(is_epoch or (low >= _LEAST_NAMED and facts.is_whole))
    return bool(is_epoch and len(facts.counts) > max(_SURE_DISTINCT, _LEAST_DISTINCT * facts.present))


def snake_case(name: str) -> str:
    """Return a name's words in lower case with underscores between them."""
    name = RECBOLE_TYPE.sub("", name.strip())
    return re.sub(r"[\W_]+", "_", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)).strip("_").lower()


def guess_split(
    times: Sequence[ColumnFacts], label: LabelGuess | None, rows: int, complete: bool, label_is_sorted: bool
) -> SplitGuess:
    """Return the split: by the time column with the most distinct times, if there is one, in which no split is empty.

    Args:
        times: the columns of times.
        label: the label.
        rows: number of rows that were read.
        complete: whether these are all rows, so that empty splits and splits of one class can be seen.
        label_is_sorted: whether all rows that were read are of one class.
    """
    labels = None if label is None else label.labels()
    times = [facts for facts in times if not _OTHER_TIMES.search(snake_case(facts.name))]
    ordered = sorted(times, key=lambda facts: -len(facts.counts))
    for facts in ordered:
        others = [shown(each.name) for each in ordered if each is not facts]
        also = f"; other times are in {', '.join(others)}" if others else ""
        if (found := _by_time(facts, labels, complete, also)) is not None:
            return found
    if complete and rows < _FEW_ROWS:
        return SplitGuess({"by": "rows", "shares": {"train": 1}}, "into train alone, since they are so few")
    rule = SplitRule("rows")
    if label_is_sorted or (complete and not _is_usable_split(rule, None, labels, complete, rows)):
        for seed in range(_SEEDS if complete else 1):
            rule = SplitRule("random", seed=seed)
            if not complete or _is_usable_split(rule, None, labels, complete, rows):
                note = "at random, since in the order of the lines a split would hold labels of one class"
                return SplitGuess({"by": "random", **({"seed": seed} if seed else {})}, note)
        note = "into train alone, since no split of them gives every part labels of both classes"
        return SplitGuess({"by": "rows", "shares": {"train": 1}}, note)
    return SplitGuess({"by": "rows"}, "in the order of files and lines; `by: random` is another way")


def _by_time(
    facts: ColumnFacts, labels: tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]] | None, complete: bool, also: str
) -> SplitGuess | None:
    """Return a split by a column of times: by shares, or by its last two times if it has too few for shares."""
    found = _times(facts)
    if found is None or len(np.unique(found)) < 3:
        return None
    note = f"by time: {len(facts.counts):,} distinct times, from {_range(facts, found)}{also}"
    keys: dict[str, Any] = {"by": "time", "column": facts.name}
    if not facts.in_path and _is_usable_split(
        SplitRule("time", column=facts.name), found, labels, complete, len(found)
    ):
        return SplitGuess(keys, note, facts.name)
    if not facts.in_path and not complete:
        return None
    last = [int(each) for each in np.unique(found)[-2:]]
    starts = {split: _text_of(facts, found, time) for split, time in zip(("valid", "test"), last, strict=True)}
    rule = SplitRule("time", column=facts.name, starts=dict(zip(("valid", "test"), last, strict=True)))
    if not facts.in_path and not _is_usable_split(rule, found, labels, complete, len(found)):
        return None
    return SplitGuess(keys | {"starts": starts}, f"{note}. The last two are valid and test", facts.name)


def _text_of(facts: ColumnFacts, times: npt.NDArray[np.int64], time: int) -> str:
    return str(facts.values[int(np.flatnonzero(times == time)[0])])


def _times(facts: ColumnFacts) -> npt.NDArray[np.int64] | None:
    """Return the times of all rows as ``mlet prepare`` orders them; None if one has no reading, or kinds are mixed."""
    found = time_values(facts.encoded, facts.name)
    if found.invalid or not len(found.values):
        return None
    kinds = {KINDS[int(code)] for code in np.unique(found.kinds)}
    values: npt.NDArray[np.int64] = found.values.to_numpy()
    if kinds == {WHOLE_NUMBERS, FRACTIONS}:
        return values * np.where(found.kinds == KINDS.index(WHOLE_NUMBERS), MILLIONTHS, 1)
    return values if len(kinds) == 1 else None


def _is_usable_split(
    rule: SplitRule,
    times: npt.NDArray[np.int64] | None,
    labels: tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]] | None,
    complete: bool,
    rows: int,
) -> bool:
    """Return whether every split has rows and, if these are all rows and have both classes, rows of both."""
    kept = np.ones(rows, dtype=bool) if labels is None or len(labels[1]) != rows else labels[1]
    count = int(kept.sum())
    if not count:
        return False
    times = None if times is None else times[kept]
    codes = make_splitter(rule, [count], [] if times is None else [times]).codes(0, 0, count, times)
    if len(np.unique(codes)) < 3:
        return False
    if labels is None or not complete:
        return True
    found = labels[0][kept]
    if len(np.unique(found)) < 2:
        return True
    return all(len(np.unique(found[codes == code])) == 2 for code in range(3))


def _range(facts: ColumnFacts, times: npt.NDArray[np.int64]) -> str:
    """Return the first and the last time, for a comment."""
    return " to ".join(shown(_text_of(facts, times, int(time))) for time in (times.min(), times.max()))
