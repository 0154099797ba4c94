"""Which column is the label, guessed from names and values, and how its values become 0 and 1."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlet_dist.data.describe.column_facts import RECBOLE_TYPE, ColumnFacts, shown
from mlet_dist.data.prepare.raw_formats import LabelColumn
from mlet_dist.data.prepare.typed_columns import label_values

# Names of labels, from the surest to the vaguest; compared in lower case, without signs between words.
_NAMES = (
    "label", "labels", "click", "clicked", "isclick", "isclicked", "clk", "islabel", "target", "y", "conversion",
    "converted", "isconversion", "isconverted", "isattributed", "purchase", "purchased", "ispurchase", "buy",
    "isbuy", "ctr", "cvr", "ctrlabel", "cvrlabel", "fraud", "isfraud", "churn", "response", "responded", "like",
    "islike", "liked", "class", "outcome",
)  # fmt: skip
_VAGUE = ("y", "class", "response", "outcome", "score", "overall", "grade")  # which also name quantities
_RATINGS = ("rating", "ratings", "stars", "score", "overall", "reviewscore", "watchratio", "grade")
_WORDS = ("label", "click", "clk", "target", "conv", "purchase", "buy", "like", "rating")  # within a name
_POSITIVE = (
    *("yes", "y", "true", "t", "click", "clicked", "clk", "1", "+1", "pos", "positive", "p", "buy", "bought"),
    *("purchase", "purchased", "converted", "conversion", "like", "liked", "good", "success", "on", ">50k", ">50k."),
)
_MAX_SPELLINGS = 16  # of 0 and 1, such as 0.0 and False
_MAX_RATINGS = 20  # distinct values of ratings
_RATING_SHARE = 0.75  # of the highest rating, from which ratings are positive


@dataclass(frozen=True)
class LabelGuess:
    """The column of the labels.

    Attributes:
        facts: the column.
        keys: the keys of the section ``label`` besides ``column``.
        notes: what was seen, for a comment.
        guess: why the column was chosen, if not for its name and values alone.
    """

    facts: ColumnFacts
    keys: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guess: str | None = None

    def labels(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
        """Return the label of each row, and which rows have one."""
        return _labels(self.facts, self.keys)

    @property
    def missing_share(self) -> float:
        """The share of rows without a label, which are malformed."""
        return 1 - float(self.labels()[1].mean())


def guess_label(columns: Sequence[ColumnFacts]) -> LabelGuess | None:
    """Return the column that is most likely the label, or None if none is likely."""
    candidates = [facts for facts in columns if not facts.is_list and facts.is_readable and facts.present]
    binary = [facts for facts in candidates if _is_binary(facts)]
    for name in (*_NAMES, *_RATINGS):
        for facts in candidates:
            if _plain_name(facts.name) != name:
                continue
            if facts in binary:
                return LabelGuess(facts, {}, _classes(facts, {}))
            is_quantity = name in _VAGUE and facts.is_number and len(facts.counts) > _MAX_RATINGS
            if not is_quantity and (mapped := _mapped(facts)) is not None:
                return mapped
    worded = [facts for facts in binary if any(word in _plain_name(facts.name) for word in _WORDS)]
    both = [facts for facts in binary if len(facts.counts) > 1]
    if worded or both:
        found = (worded or both)[0]
        others = [shown(facts.name) for facts in both if facts is not found][:10]
        why = "the first column of 0s and 1s" + (" with such a name" if worded else "")
        if others:
            why += f"; {', '.join(others)} hold{'s' if len(others) == 1 else ''} 0s and 1s, too"
        return LabelGuess(found, {}, _classes(found, {}), why)
    for facts in candidates:
        if _is_rating(facts):
            mapped = _mapped(facts)
            assert mapped is not None
            return LabelGuess(
                facts, mapped.keys, mapped.notes, "no column holds 0s and 1s; this one looks like ratings"
            )
    return None


def _plain_name(name: str) -> str:
    """Return a name in lower case, without signs and without RecBole's suffix of a type."""
    return re.sub(r"[\W_]", "", RECBOLE_TYPE.sub("", name.strip())).lower()


def _is_binary(facts: ColumnFacts) -> bool:
    """Return whether the values that are not missing are 0 and 1, in any spelling that ``mlet prepare`` takes."""
    if len(facts.counts) > _MAX_SPELLINGS:
        return False
    found = label_values(facts.encoded, LabelColumn(facts.name))
    return not found.others and 0 < len(found.values) - len(found.invalid) == facts.present


def _is_rating(facts: ColumnFacts) -> bool:
    """Return whether the values are whole or half numbers from 0 or 1 to 5 or 10, as ratings are."""
    if not facts.is_number or len(facts.counts) < 4:
        return False
    numbers = np.unique(facts.numbers)
    return numbers[0] >= 0 and numbers[-1] in (5, 10) and bool((2 * numbers == np.trunc(2 * numbers)).all())


def _mapped(facts: ColumnFacts) -> LabelGuess | None:
    """Return the keys that make labels of other values than 0 and 1; None if there are none."""
    if facts.is_number:
        numbers = np.unique(facts.numbers)
        if len(numbers) < 2:
            return None
        if len(numbers) == 2:
            start, why = numbers[1], "of two numbers, the larger one is taken for positive"
        elif len(numbers) <= _MAX_RATINGS:
            above = numbers[numbers >= _RATING_SHARE * numbers[-1]] if numbers[-1] > 0 else numbers[-1:]
            start, why = max(above[0], numbers[1]), "numbers from here on are taken for positive"
        else:
            start, why = (
                max(_rounded(np.median(facts.numbers)), numbers[1]),
                "about the median; numbers from here on are positive",
            )
        keys: dict[str, Any] = {"positive_from": int(start) if start == int(start) else float(start)}
        return LabelGuess(facts, keys, _classes(facts, keys), why)
    texts = list(facts.counts)
    folded = {text.strip().lower() for text in texts}
    if len(folded) != 2:
        return None
    positive = [text for text in texts if text.strip().lower() in _POSITIVE]
    why = "this spelling is taken for positive"
    if not positive or len({text.strip().lower() for text in positive}) == 2:
        rarest = texts[-1].strip().lower()
        positive = [text for text in texts if text.strip().lower() == rarest]
        why = "of two values, the rarer one is taken for positive"
    keys = {"positive": sorted(positive)}
    return LabelGuess(facts, keys, _classes(facts, keys), why)


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")


def _labels(facts: ColumnFacts, keys: dict[str, Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    positive = keys.get("positive")
    column = LabelColumn(facts.name, keys.get("positive_from"), None if positive is None else tuple(positive))
    found = label_values(facts.encoded, column)
    valid = np.ones(len(found.values), dtype=bool)
    valid[list(found.invalid)] = False
    return found.values.to_numpy(), valid


def _classes(facts: ColumnFacts, keys: dict[str, Any]) -> tuple[str, ...]:
    """Return remarks on the values and classes."""
    labels, valid = _labels(facts, keys)
    share = float(labels[valid].mean()) if valid.any() else 0.0
    seen = "values" if not keys else "labels"
    few = ", ".join(f"{shown(text)} ({count:,})" for text, count in facts.counts.items())
    if len(facts.counts) > _MAX_RATINGS:
        few = f"{len(facts.counts):,} distinct, from {facts.numbers[0]:.6g} to {facts.numbers[-1]:.6g}"
    notes = [f"{seen} and their rows: {few}; positive are {share:.1%}"]
    if share in (0.0, 1.0):
        notes.append("all of these rows are of one class: the file may be sorted by its label")
    if not valid.all():
        notes.append(f"{1 - valid.mean():.1%} of the rows have no label and are malformed")
    return tuple(notes)
