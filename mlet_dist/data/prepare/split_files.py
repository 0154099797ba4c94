"""Raw files that are split already: which file belongs to which split, and the report of where the rows went."""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.data.schema import SPLITS
from mlet_dist.errors import UserError

SHOWN_FILES = 4  # of a split in a message

_WORDS = {  # in the names of files
    "train": {"train", "training"},
    "valid": {"valid", "validation", "val", "dev", "eval"},
    "test": {"test", "testing"},
}


def rule_of_lists(lists: Mapping[str, Sequence[str]]) -> SplitRule:
    """Return the rule that gives the files of each list to its split.

    Raises:
        UserError: a list is of no split, or there are no training files.
    """
    for split in lists:
        if split not in SPLITS:
            raise UserError(f"raw files of a split {split!r} were given; the splits are {', '.join(SPLITS)}")
    if not lists.get("train"):
        raise UserError("no raw file of the training split was given; name at least one")
    return SplitRule("file", files={split: tuple(lists[split]) for split in SPLITS if lists.get(split)})


def assign_files(rule: SplitRule, paths: Sequence[str]) -> tuple[str | None, ...]:
    """Return the split of each file by a rule by ``file``; None for the file that is cut into shares.

    Raises:
        UserError: there is no training file, a name of ``rule.files`` is that of no file, a file is given to two splits
            or to none, or ``files`` is missing where the names of the files suggest other splits than the rule.
    """
    if rule.files is None:
        if len(paths) == 1:
            raise UserError(
                f"{paths[0]}: split by file cuts the last file into {' and '.join(rule.shares)}, and there is no other "
                "to train on; give more files, or split by rows"
            )
        _check_names(paths)
        return (*("train" for _ in paths[:-1]), None)
    positions = {path: index for index, path in enumerate(paths)}
    found: list[str | None] = [None for _ in paths]
    for split, names in rule.files.items():
        for name in names:
            matching = [positions[name]] if name in positions else _matching(name, paths)
            if not matching:
                raise UserError(
                    f"split.files.{split} names {name!r}, but no raw file has this name; give all files, also those of "
                    f"valid and test: the raw files are {_listed(paths)}"
                )
            for index in matching:
                if found[index] not in (None, split):
                    raise UserError(f"{paths[index]}: split.files gives it to {found[index]} and to {split}")
                found[index] = split
    if "train" in rule.files:
        for path, split_of in zip(paths, found, strict=True):
            if split_of is None:
                raise UserError(
                    f"{path}: split.files gives it to no split; name it there, or leave it out of the raw files"
                )
    splits = tuple(split or "train" for split in found)
    if "train" not in splits:
        raise UserError(f"split.files leaves none of the raw files to train on: {_listed(paths)}")
    return splits


def misleading_names(rule: SplitRule, paths: Sequence[str]) -> str | None:
    """Return a warning if files are named like splits and the rule does not split by file."""
    suggested = {path: split for path in paths if (split := _suggested(path)) is not None}
    if rule.by == "file" or len(paths) < 2 or len(set(suggested.values())) < 2:
        return None
    return (
        f"{_listed(list(suggested))}: the names of these files suggest splits, but all rows are split by {rule.by}; "
        "to keep the splits, give the files with --train, --valid and --test"
    )


def describe_splits(rule: SplitRule, paths: Sequence[str], rows: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """Yield one line for each split: how many rows it has, and of which files; ``rows`` has each file's by split."""
    total = sum(sum(each.values()) for each in rows)
    in_order = rule.by in ("rows", "file")
    for split in rule.splits:
        entries = []
        for path, of_file in zip(paths, rows, strict=True):
            count, all_rows = of_file[split], sum(of_file.values())
            if not count:
                continue
            entry = path
            if count < all_rows and in_order:
                order = list(rule.shares)
                start = sum(of_file[each] for each in order[: order.index(split)])
                entry = f"{path} rows {start + 1:,}-{start + count:,}"
            elif count < all_rows:
                entry = f"{path} {count:,} of {all_rows:,} rows"
            entries.append(entry)
        count = sum(each[split] for each in rows)
        yield f"split  {split}  {count:,} of {total:,} rows: {_listed(entries)}"


def _check_names(paths: Sequence[str]) -> None:
    if len({_suggested(path) for path in paths}) == 1:
        return
    for path in paths[:-1]:
        if (split := _suggested(path)) in ("valid", "test"):
            raise UserError(
                f"{path}: is named like {split} data, and would be trained on: by file, all files but the last "
                f"({paths[-1]}) are train; name the files of each split with --train, --valid and --test, or in the "
                f"description with `split: {{by: file, files: {{{split}: …}}}}`"
            )


def _suggested(path: str) -> str | None:
    """Return the split that a word in the name of a file, or else the name of its directory, suggests."""
    *directories, name = path.lower().split("/")
    for words in (set(re.split("[^a-z]+", name)), set(directories[-1:])):
        for split, known in _WORDS.items():
            if words & known:
                return split
    return None


def _matching(name: str, paths: Sequence[str]) -> list[int]:
    """Return the files whose last parts are ``name``, a path or a pattern; or else those below such a directory."""
    wanted = [part for part in name.rstrip("/").split("/") if part not in ("", ".", "**")]
    parts = [path.split("/") for path in paths]
    found = [index for index, each in enumerate(parts) if _is_match(each[-len(wanted) :], wanted)]
    return found or [
        index
        for index, each in enumerate(parts)
        if any(_is_match(each[start : start + len(wanted)], wanted) for start in range(len(each) - len(wanted)))
    ]


def _is_match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    return len(parts) == len(patterns) > 0 and all(
        part == pattern or fnmatchcase(part, pattern) for part, pattern in zip(parts, patterns, strict=True)
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more
