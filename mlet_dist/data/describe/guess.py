"""The description of a raw file: reads its head, guesses the role of each column, and writes the text."""

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from mlet_dist.data.describe.column_facts import ColumnFacts
from mlet_dist.data.describe.column_roles import guess_roles, with_sparse_feature, without_label
from mlet_dist.data.describe.description_text import description_text
from mlet_dist.data.describe.head import Head, read_head
from mlet_dist.data.describe.label_guess import guess_label
from mlet_dist.data.describe.time_guess import guess_split, is_time
from mlet_dist.errors import UserError


@dataclass(frozen=True)
class Described:
    """A description of a raw file.

    Attributes:
        text: the description, as commented YAML.
        rows: number of rows that were read for it.
        label: name of the label's column; None if none was found.
        dense, sparse: number of columns that become features.
    """

    text: str
    rows: int
    label: str | None
    dense: int
    sparse: int


def describe(name: str) -> Described:
    """Return a description of a raw file, guessed from its first rows, that ``mlet prepare table`` takes for it.

    Args:
        name: path or URL of a file, a directory or a pattern, as for ``prepare``.

    Raises:
        UserError: it cannot be read, has no rows, or no columns to make features of.
    """
    head = read_head(name)
    columns, doubles = _columns(head)
    label = guess_label([facts for facts in columns if not facts.in_path])
    others = [facts for facts in columns if label is None or facts is not label.facts]
    times = [facts for facts in others if is_time(facts) and len(facts.counts) > 1]
    if len(others) == 1:
        times = []  # the only column must be a feature
    is_sorted = label is not None and not head.complete and len(label.facts.counts) == 1
    split = guess_split(times, label, head.rows, head.complete, is_sorted)
    roles = guess_roles([facts for facts in others if split.column is None or facts.name != split.column])
    if label is not None:
        roles = [without_label(role, label) for role in roles]
    roles = with_sparse_feature(roles)
    if not roles:
        raise UserError(
            f"{head.path}: has no column to make a sparse feature of, besides label and time; the columns are "
            f"{', '.join(map(repr, head.names)):.300}"
        )
    text = description_text(name, head, label, split, roles, doubles)
    found = Counter(role.kind for role in roles)
    return Described(text, head.rows, None if label is None else label.facts.name, found["dense"], found["sparse"])


def _columns(head: Head) -> tuple[list[ColumnFacts], list[str]]:
    """Return the columns with names of their own, and the names that more than one column has."""
    counts = Counter([*head.names, *head.directories])
    columns = [
        ColumnFacts(name, values)
        for name, values in zip(head.names, head.columns, strict=True)
        if counts[name] == 1 and name
    ]
    for key, values in head.directories.items():
        if counts[key] == 1:
            columns.append(ColumnFacts(key, pa.array(values, pa.string()), in_path=True))
    return columns, [name for name, count in counts.items() if count > 1 or not name]
