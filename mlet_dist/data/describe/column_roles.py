"""What each column becomes: a dense feature, a sparse one, or nothing, guessed from its name and its values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mlet_dist.data.describe.column_facts import ColumnFacts
from mlet_dist.data.describe.label_guess import LabelGuess
from mlet_dist.data.describe.list_guess import ListGuess, guess_list
from mlet_dist.data.describe.time_guess import is_time, snake_case
from mlet_dist.data.prepare.raw_formats import DenseColumn, SparseColumn
from mlet_dist.data.prepare.raw_values import as_texts
from mlet_dist.data.prepare.typed_columns import dense_values, value_texts

# Words of names of quantities and of categories. The last word of a name says most, the first one next.
_QUANTITIES = (
    "count counts cnt num number n total sum avg mean std var min max rate ratio ctr cvr pct percent price cost amount "
    "revenue income salary age duration len length size width height weight score prob probability seconds sec minutes "
    "freq frequency views clicks impressions lat latitude lon lng longitude distance balance qty quantity value "
    "temperature budget bid discount days years loss gain"
)
_CATEGORIES = (
    "id ids uid iid pid sid cid gid user item movie film book song artist product sku ad adgroup campaign creative "
    "advertiser brand cate category cat class type kind code zip zipcode postal region country state city gender sex "
    "occupation job device os browser app site domain page channel source platform lang language version model pos "
    "position slot tag genre level group segment cluster bucket hash key token weekday month hour day dow status flag "
    "is has shop seller store customer visitor session query publisher network carrier color colour range idx index "
    "author video music creator merchant node education marital relationship race"
)
_ROW_NAMES = frozenset(("id", "rowid", "index", "idx", "row", "rownumber", "rownum", "unnamed0", "uuid", "guid", ""))

_LEAST_ROWS = 100  # fewer rows with values of their own do not make a column a row identifier
_MOST_INVALID = 0.01  # share of rows, with infinities, that a dense feature may make malformed
_LEAST_COUNTS = 5  # distinct numbers of a column of counts


@dataclass(frozen=True)
class Role:
    """What a column becomes.

    Attributes:
        facts: the column.
        kind: the section of the description that it belongs to; None if it is left out.
        keys: the keys of its entry besides ``column`` and ``name``.
        notes: what was seen besides values and missing ones, or why the column is left out.
    """

    facts: ColumnFacts
    kind: Literal["dense", "sparse"] | None
    keys: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def guess_roles(columns: Sequence[ColumnFacts]) -> list[Role]:
    """Return the role of each column, in order; none is for the label or for times of a split."""
    lists = {facts: found for facts in columns if (found := _readable_list(facts)) is not None}
    roles = [_of_list(facts, lists[facts]) if facts in lists else _role(facts) for facts in columns]
    for facts, found in lists.items():
        if not found.keys:
            _join_weights(facts, found, lists, roles)
    return roles


def without_label(role: Role, label: LabelGuess) -> Role:
    """Return the role; a column of few values, each of which goes with one label only, is left out.

    Such a column tells the label. A missing value is one of its values: a conversion that is known after clicks alone
    has three of them.
    """
    facts = role.facts
    if role.kind is None or facts.is_list or facts.in_path or facts.rows < _LEAST_ROWS:
        return role
    if len(facts.counts) + (facts.missing_share > 0) not in (2, 3):
        return role
    labels, valid = label.labels()
    texts = as_texts(facts.values, "text", facts.spellings)[0].to_numpy(zero_copy_only=False)[valid]
    pairs = set(zip(texts.tolist(), labels[valid].tolist(), strict=True))
    if len(pairs) != len(set(texts.tolist())) or len({label for _, label in pairs}) < 2:
        return role
    return Role(facts, None, notes=("it tells the label: each of its values goes with one label only",))


def with_sparse_feature(roles: Sequence[Role]) -> list[Role]:
    """Return the roles with one sparse feature at least, since a data set must have one; empty if there can be none.

    It is a column that was left out, or else the column of numbers with the fewest distinct ones.
    """
    if any(role.kind == "sparse" for role in roles):
        return list(roles)
    usable = [
        (i, role) for i, role in enumerate(roles) if role.facts.is_readable and _sparse_keys(role.facts) is not None
    ]
    if not usable:
        return []
    place, role = min(usable, key=lambda item: (item[1].kind != "dense", len(item[1].facts.counts), item[0]))
    note = "a data set needs a sparse feature, and no column looks like one: this is a stand-in"
    found = list(roles)
    found[place] = Role(role.facts, "sparse", _sparse_keys(role.facts) or {}, (note,))
    return found


def _readable_list(facts: ColumnFacts) -> ListGuess | None:
    return None if not facts.is_list and (not facts.is_text or is_time(facts)) else guess_list(facts)


def _of_list(facts: ColumnFacts, found: ListGuess) -> Role:
    if not found.keys:
        return Role(facts, None, notes=(f"{found.note}, such as a vector",))
    if not found.lengths.any():
        return Role(facts, None, notes=("all lists are empty",))
    return Role(facts, "sparse", found.keys, (f"{found.note}; {found.lengths.mean():.1f} values a row",))


def _join_weights(facts: ColumnFacts, found: ListGuess, lists: dict[ColumnFacts, ListGuess], roles: list[Role]) -> None:
    """Make lists of numbers the weights of lists of the same lengths whose name begins theirs, such as tags_weights."""
    name = snake_case(facts.name)
    if not re.search(r"(weight|weights|wt|score|scores)(_|$)", name):
        return
    for i, role in enumerate(roles):
        other = lists.get(role.facts)
        stem = snake_case(role.facts.name).rstrip("s")
        if other is None or not other.keys or "weight_separator" in other.keys or "weights" in role.keys:
            continue
        if name.startswith(stem) and np.array_equal(other.lengths, found.lengths):
            place = next(j for j, each in enumerate(roles) if each.facts is facts)
            roles[i] = replace(role, keys=role.keys | {"weights": facts.name})
            roles[place] = replace(roles[place], notes=(f"the weights of {role.facts.name}",))
            return


def _role(facts: ColumnFacts) -> Role:
    """Return the role of a column of single values."""
    if facts.is_list or not facts.is_readable:
        kind = f"values of type {facts.values.type}"
        if facts.values.type == pa.struct([]):
            kind = "JSON objects, nested lists, or lists beside single values"
        return Role(facts, None, notes=(f"{kind}, which have no reading",))
    if not facts.present:
        return Role(facts, None, notes=("all values are missing",))
    if len(facts.counts) == 1 and facts.present == facts.rows:
        return Role(facts, None, notes=(f"one value in all rows: {facts.examples()}",))
    if is_time(facts) and not facts.in_path:
        return Role(facts, None, notes=(f"times, such as {facts.examples()}",))
    is_count = _is_quantity(facts)
    if _is_row_identifier(facts) and not is_count:
        return Role(facts, None, notes=(f"a value of its own in each row, such as {facts.examples()}",))
    if is_count:
        keys = _dense_keys(facts)
        invalid = dense_values(facts.encoded, _dense_column(facts, keys)).invalid
        if len(invalid) <= _MOST_INVALID * facts.rows:
            return Role(facts, "dense", keys, (f"malformed in {len(invalid)} rows",) if invalid else ())
    found = _sparse_keys(facts)
    if found is None:
        return Role(facts, None, notes=(f"values of type {facts.values.type}, not all of which have an exact reading",))
    nearly = facts.present > _LEAST_ROWS and len(facts.counts) > 0.9 * facts.present
    return Role(facts, "sparse", found, ("almost every row has a value of its own",) if nearly else ())


def _is_quantity(facts: ColumnFacts) -> bool:
    """Return whether a column of numbers is a quantity rather than an identifier or a code."""
    if not facts.is_number or facts.in_path:
        return False
    suffix = facts.name.rpartition(":")[2]
    if suffix in ("float", "token"):
        return suffix == "float"
    if not facts.is_whole or (facts.has_odd_spellings and not facts.is_text):  # infinities
        return True
    if facts.has_leading_zeros or abs(facts.numbers[[0, -1]]).max() >= 2.0**53:
        return False
    if re.fullmatch(r"[IC][0-9]+", facts.name):  # as Criteo and Avazu name integers and categories
        return facts.name.startswith("I") and len(facts.counts) > 2
    words = snake_case(facts.name).split("_")
    for word in (words[-1], words[0]):
        if word in _QUANTITIES.split() and len(facts.counts) > 2:
            return True
        if word in _CATEGORIES.split():
            return False
    numbers = facts.numbers
    if numbers[0] < -1:
        return True
    # Most counts are small, and a few are large; identifiers and codes are spread, or few.
    return bool(
        len(facts.counts) >= _LEAST_COUNTS
        and numbers[0] <= 1
        and np.quantile(numbers, 0.75) <= numbers[-1] / 4
        and len(facts.counts) < 0.9 * facts.present
    )


def _is_row_identifier(facts: ColumnFacts) -> bool:
    """Return whether each row has a value of its own, in a column that is named so or long enough to tell."""
    if len(facts.counts) < facts.present or facts.in_path or (facts.is_number and not facts.is_whole):
        return False
    named = re.sub(r"[\W_]", "", facts.name).lower() in _ROW_NAMES
    if named or facts.present >= _LEAST_ROWS:
        return True
    return facts.is_whole and facts.present >= 10 and bool((np.diff(facts.numbers) == 1).all())


def _dense_keys(facts: ColumnFacts) -> dict[str, Any]:
    numbers = facts.numbers
    keys: dict[str, Any] = {}
    if -numbers[0] > max(numbers[-1], 0) / 10:  # log1p makes 0 of negative numbers
        keys = {"transform": "standardise", "missing": "mean"}
    return keys | ({"missing_values": list(facts.spellings)} if facts.has_odd_spellings and facts.is_text else {})


def _dense_column(facts: ColumnFacts, keys: dict[str, Any]) -> DenseColumn:
    spellings = keys.get("missing_values")
    return DenseColumn(
        facts.name, facts.name, "log1p", 0.0, missing_values=None if spellings is None else tuple(spellings)
    )


def _sparse_keys(facts: ColumnFacts) -> dict[str, Any] | None:
    """Return the keys with which ``mlet prepare`` takes every value, whole numbers as such; None if there are none."""
    choices: list[dict[str, Any]] = [{}, {"cast": "text"}]
    if facts.is_text and facts.has_points and not facts.has_leading_zeros:
        choices.insert(0, {"cast": "integer"})  # 7.0 is 7
    for keys in choices:
        if not value_texts(facts.encoded, SparseColumn(facts.name, facts.name, **keys)).invalid:
            return keys
    return None
