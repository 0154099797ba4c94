"""How many ids of each feature and split are out of vocabulary, and how many rows have no ids at all."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlet_dist.data.location import DataPath
from mlet_dist.errors import UserError
from mlet_dist.formatting import text_table

LARGE_SHARE = 0.2  # of ids that are out of vocabulary, in valid or test


@dataclass(frozen=True)
class IdCounts:
    """Counts of a feature in a split.

    Attributes:
        ids: number of ids.
        out_of_vocabulary: number of ids 0, which stand for values that the vocabulary lacks; None without a vocabulary.
        empty_lists: number of rows without ids.
    """

    ids: int = 0
    out_of_vocabulary: int | None = 0
    empty_lists: int = 0

    def __add__(self, other: "IdCounts") -> "IdCounts":
        missing = None in (self.out_of_vocabulary, other.out_of_vocabulary)
        unknown = None if missing else (self.out_of_vocabulary or 0) + (other.out_of_vocabulary or 0)
        return IdCounts(self.ids + other.ids, unknown, self.empty_lists + other.empty_lists)

    @property
    def out_of_vocabulary_share(self) -> float | None:
        """Share of the ids that are out of vocabulary; None without a vocabulary or ids."""
        return None if self.out_of_vocabulary is None or not self.ids else self.out_of_vocabulary / self.ids


SplitCounts = Mapping[str, Mapping[str, IdCounts]]
"""Counts by split and feature; a data set that was not made by `mlet prepare` has none."""


def add_counts(parts: Iterable[SplitCounts]) -> dict[str, dict[str, IdCounts]]:
    """Return the sums of the counts of several parts of each split."""
    total: dict[str, dict[str, IdCounts]] = {}
    for part in parts:
        for split, features in part.items():
            into = total.setdefault(split, {})
            for name, counts in features.items():
                into[name] = into[name] + counts if name in into else counts
    return total


def counts_to_plain(counts: SplitCounts) -> dict[str, dict[str, dict[str, Any]]]:
    """Return counts as plain data for JSON."""
    return {split: {name: asdict(each) for name, each in features.items()} for split, features in counts.items()}


def counts_from_plain(plain: Any, source: object) -> dict[str, dict[str, IdCounts]]:
    """Return the counts that ``counts_to_plain`` turned into plain data; ``source`` is named in messages.

    Raises:
        UserError: ``plain`` is something else.
    """
    try:
        found = {split: {name: IdCounts(**each) for name, each in of.items()} for split, of in plain.items()}
        numbers = [number for of in found.values() for each in of.values() for number in asdict(each).values()]
        if not all(number is None or (type(number) is int and number >= 0) for number in numbers):
            raise ValueError("a count is not a whole number, 0 or more")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{source}: id_counts cannot be read: {error}; prepare the data set again") from None
    return found


def of_features(counts: SplitCounts, features: Collection[str]) -> dict[str, dict[str, IdCounts]]:
    """Return the counts of some features."""
    return {split: {name: each for name, each in of.items() if name in features} for split, of in counts.items()}


def out_of_vocabulary_shares(counts: SplitCounts, split: str) -> dict[str, float]:
    """Return each feature's share of ids of ``split`` that are out of vocabulary, without features that have none."""
    shares = {name: each.out_of_vocabulary_share for name, each in counts.get(split, {}).items()}
    return {name: share for name, share in shares.items() if share}


def overall_share(counts: SplitCounts, split: str) -> float | None:
    """Return the share of all features' ids that are out of vocabulary; None if no feature has a vocabulary."""
    known = [each for each in counts.get(split, {}).values() if each.out_of_vocabulary is not None]
    return sum(known, IdCounts()).out_of_vocabulary_share


def out_of_vocabulary_warnings(path: DataPath, counts: SplitCounts, splits: Iterable[str]) -> list[str]:
    """Return a warning for each split in which a feature has a large share of ids that are out of vocabulary."""
    warnings = []
    for split in splits:
        large = {name: share for name, share in out_of_vocabulary_shares(counts, split).items() if share > LARGE_SHARE}
        if not large:
            continue
        worst = sorted(large, key=lambda name: -large[name])
        shown = ", ".join(f"{name} {large[name]:.0%}" for name in worst[:5])
        more = f" and {len(large) - 5} more" if len(large) > 5 else ""
        trained = counts.get("train", {})
        untrained = [name for name in worst if name in trained and trained[name].out_of_vocabulary == 0]
        zero = f"; no training row has id 0 of {', '.join(untrained[:5])}, so its vector is zero" if untrained else ""
        warnings.append(
            f"{path}: more than {LARGE_SHARE:.0%} of the ids of {split} are out of vocabulary (id 0): {shown}{more}; "
            f"their values do not occur in the training split that the vocabulary was made from, or too rarely for "
            f"min_count or max_num_embeddings{zero}"
        )
    return warnings


def counts_table(counts: SplitCounts) -> list[str]:
    """Return the lines of a table with the share of ids out of vocabulary, and of empty lists, by feature and split."""
    splits = list(counts)
    names = list(dict.fromkeys(name for features in counts.values() for name in features))
    lists = any(each.empty_lists for features in counts.values() for each in features.values())
    rows = []
    for name in names:
        of_splits = [counts[split].get(name, IdCounts()) for split in splits]
        row = [name, *("" if (s := each.out_of_vocabulary_share) is None else f"{s:.2%}" for each in of_splits)]
        rows.append(row + ([f"{each.empty_lists:,}" for each in of_splits] if lists else []))
    if not rows:
        return []
    header = ["ids out of vocabulary", *splits, *((f"empty lists, {split}" for split in splits) if lists else ())]
    return text_table(header, rows, left=1)
