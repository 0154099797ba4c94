"""The commented description of a table that ``mlet describe`` prints."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from mlet_dist.data.column_names import MAX_NAME_BYTES, is_name, is_table_name
from mlet_dist.data.describe.column_facts import shown
from mlet_dist.data.describe.column_roles import Role
from mlet_dist.data.describe.head import Head
from mlet_dist.data.describe.label_guess import LabelGuess
from mlet_dist.data.describe.time_guess import SplitGuess
from mlet_dist.data.describe.yaml_text import can_be_listed, ranges, yaml_list, yaml_scalar, yaml_value
from mlet_dist.data.prepare.raw_formats import LABEL, JsonLines
from mlet_dist.errors import one_line

_SHARE = 0.05  # of malformed rows, from which the description allows twice as many as were seen


def description_text(
    name: str, head: Head, label: LabelGuess | None, split: SplitGuess, roles: Sequence[Role], doubles: Sequence[str]
) -> str:
    """Return the description as YAML.

    Args:
        name: the file, directory or pattern that was described.
        head: its first rows.
        label: the label; None if none was found.
        split: how rows are split.
        roles: the other columns.
        doubles: names that more than one column has, so that none of them can be used.
    """
    lines = [*_beginning(name, head), *_format(head), "", *_label(label, roles), "", *_split(split), ""]
    names = _names(roles)
    dense, sparse = ([role for role in roles if role.kind == kind] for kind in ("dense", "sparse"))
    if dense:
        lines += ["# Dense features: log1p is log(1 + max(x, 0)), the default; standardise keeps negative numbers."]
        lines += ["dense:", *_entries(dense, names, {}), ""]
    spellings = sorted({spelling for role in sparse for spelling in role.facts.spellings})
    if spellings == ["\\N"]:
        spellings = []  # the default
    lines += ["# Sparse features. Values with fewer than min_count occurrences in training share id 0."]
    lines += ["sparse:", *_entries(sparse, names, {"min_count": 2}, spellings), ""]
    lines += _left_out(roles, doubles)
    return "\n".join([*lines, *_malformed(head, label)]).rstrip("\n") + "\n"


def _beginning(name: str, head: Head) -> list[str]:
    which = f"all {head.rows:,} rows" if head.complete else f"the first {head.rows:,} rows"
    of = "" if head.files == 1 else f" of {one_line(head.path)}, the first with rows of {head.files:,} files"
    return [
        f"# A description of {one_line(name)} for `mlet prepare table`, made by `mlet describe`",
        f"# from {which}{of}.",
        "# What each column means is guessed from its name and values: check it, and correct what is wrong. Then:",
        "#",
        f"#   mlet prepare table {one_line(shlex.quote(name))} --schema THIS_FILE --out DIRECTORY",
        "#",
        "# configs/tables/movielens.yaml explains all keys.",
        "",
    ]


def _format(head: Head) -> list[str]:
    if head.text is None:
        return ["format: parquet"]
    lines = ["format: jsonl" if isinstance(head.text, JsonLines) else "format: csv"]
    if not isinstance(head.text, JsonLines):
        lines.append(f"delimiter: {yaml_scalar(head.text.delimiter)}")
        if head.text.quote != '"':
            lines.append("quote: null" if head.text.quote is None else f"quote: {yaml_scalar(head.text.quote)}")
        lines.append(f"header: {yaml_scalar(head.text.header)}")
        if head.text.columns is not None:
            lines += ["# The file has no names of columns. These are made up:"]
            lines += [f"columns: {yaml_list(head.text.columns, 9)}"]
    if head.text.encoding is not None:
        lines.append(f"encoding: {head.text.encoding}  # a guess: the text is not UTF-8")
    return lines


def _label(label: LabelGuess | None, roles: Sequence[Role]) -> list[str]:
    if label is None:
        few = [role.facts for role in roles if not role.facts.is_list and role.facts.is_readable]
        few = [facts for facts in few if len(facts.counts) == 2 or (facts.is_number and 2 < len(facts.counts) <= 20)]
        seen = [f"#   {shown(facts.name)}: {', '.join(map(shown, facts.counts)):.80}" for facts in few[:10]]
        return [
            "# No column of labels was found, and `mlet prepare` needs one. Set it here, and remove the column from",
            "# the features below. Unless it holds 0s and 1s, add positive_from (numbers from this one on are 1,",
            "# smaller ones 0) or positive (the list of the values that are 1):",
            "# label: {column: NAME, positive_from: 4}",
            *(["# Columns with two values or few numbers:", *seen] if seen else []),
        ]
    lines = ["# The label: 1 is positive, 0 negative."]
    if label.guess is not None:
        lines.append(f"# A guess: {label.guess}.")
    lines += ["label:", f"  column: {yaml_scalar(label.facts.name)}"]
    lines += [f"  {key}: {yaml_value(value, 2 + len(key) + 2)}" for key, value in label.keys.items()]
    return [*lines, *(f"  # {note}" for note in label.notes)]


def _split(split: SplitGuess) -> list[str]:
    keys = (f"  {key}: {yaml_value(value, 2 + len(key) + 2)}" for key, value in split.keys.items())
    return [f"# Rows are split {split.note}.", "split:", *keys]


def _entries(
    roles: Sequence[Role], names: dict[int, str], keys: dict[str, Any], spellings: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the entries of a section, one for all columns with the same keys, each after a table of what was seen."""
    groups: dict[str, list[Role]] = {}
    for i, role in enumerate(roles):
        # A column that needs a name of its own, or weights, cannot share an entry.
        alone = names.get(id(role)) is not None or not can_be_listed(role.facts.name) or "weights" in role.keys
        shared = sorted((key, repr(value)) for key, value in role.keys.items())
        groups.setdefault(f"{i} alone" if alone else repr(shared), []).append(role)
    for group in groups.values():
        yield from (f"  # {line}".rstrip() for line in _table(group))
        first = group[0]
        if len(group) == 1:
            yield f"  - column: {yaml_scalar(first.facts.name)}"
            if (name := names.get(id(first))) is not None:
                yield f"    name: {yaml_scalar(name)}"
        else:
            yield f"  - columns: {yaml_list(ranges([role.facts.name for role in group]), 14)}"
        found = first.keys | {key: value for key, value in keys.items() if key not in first.keys}
        if spellings and "missing_values" not in found and found.get("cast") != "integer":
            found["missing_values"] = list(spellings)
        for key, value in found.items():
            yield f"    {key}: {yaml_value(value, 4 + len(key) + 2)}"


def _table(group: Sequence[Role]) -> Iterator[str]:
    """Yield a line for each column of a group: its distinct values, the share of missing ones, examples and notes."""
    rows = [(shown(role.facts.name), *_numbers(role), "; ".join(role.notes)) for role in group]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for column, distinct, missing, examples, notes in rows:
        parts = (f"{column:<{widths[0]}} ", f"{distinct:>{widths[1]}}", f"{missing:>{widths[2]}}", examples)
        text = " ".join(part for part in parts if part)
        yield f"{text}  ({notes})" if notes and examples else text + notes


def _numbers(role: Role) -> tuple[str, str, str]:
    facts = role.facts
    if facts.is_list:
        return "", "", ""
    of = f"{facts.rows:,} files" if facts.in_path else f"{facts.rows:,} rows"
    missing = f"{facts.missing_share:.1%} missing," if 0 < facts.missing_share < 1 else ""
    seen = "from" if facts.is_number and not facts.is_whole else "such as"
    return f"{len(facts.counts):,} distinct of {of},", missing, f"{seen} {facts.examples()}"


def _names(roles: Sequence[Role]) -> dict[int, str]:
    """Return a name for each feature whose column's name is not allowed, or taken, by the id of its role."""
    used = [role for role in roles if role.kind is not None]
    allowed = {"dense": is_name, "sparse": is_table_name}
    taken = {LABEL} | {role.facts.name for role in used if allowed[str(role.kind)](role.facts.name)}
    names: dict[int, str] = {}
    for place, role in enumerate(used):
        name = role.facts.name
        if allowed[str(role.kind)](name) and name != LABEL:
            continue
        base = re.sub(r"[^\w-]+", "_", name).strip("_")
        base = base.encode()[: MAX_NAME_BYTES - 20].decode(errors="ignore") or f"column_{place + 1}"
        number = 1
        while not allowed[str(role.kind)](found := base if number == 1 else f"{base}_{number}") or found in taken:
            number += 1
        names[id(role)] = found
        taken.add(found)
    return names


def _left_out(roles: Sequence[Role], doubles: Sequence[str]) -> list[str]:
    out = [(shown(role.facts.name), "; ".join(role.notes)) for role in roles if role.kind is None]
    for name in doubles:
        why = "more than one column has this name" if name else "it has no name"
        out.append((shown(name), f"{why}; rename it in the file to use it"))
    if not out:
        return []
    width = max(len(name) for name, _ in out)
    return ["# Columns that are left out:", *(f"#   {name:<{width}}  {why}" for name, why in out), ""]


def _malformed(head: Head, label: LabelGuess | None) -> list[str]:
    lines = head.malformed + head.rows
    missing = 0.0 if label is None else label.missing_share
    share = (head.malformed + missing * head.rows) / lines
    if share <= _SHARE:
        return []
    why = (
        "cannot be parsed or have no label"
        if missing and head.malformed
        else "have no label"
        if missing
        else "cannot be parsed"
    )
    return [f"# {share:.1%} of the lines {why}. They are skipped.", f"max_malformed: {min(1.0, round(2 * share, 2))}"]
