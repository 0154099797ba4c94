"""How the columns of a data set were made from raw values, which decides what each input of a model means.

Data sets record it; models, checkpoints, exports and factors take it over; where two of them meet, it is compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from mlet_dist.formatting import to_json

Rules = Mapping[str, Any]
"""The rules by which one column was made, as plain data for JSON."""

# Fields of a column's description that do not change the meaning of its finished values. All others do, so that a new
# field is compared unless it is named here.
_NAMES = {"name", "column"}
_DENSE_OMITTED = _NAMES | {"integer"}  # only decides which rows are malformed
_SPARSE_OMITTED = _NAMES | {
    *("separator", "weights", "weight_separator"),  # how a raw file spells lists
    *("multi_valued", "min_count", "max_num_embeddings"),  # in the schema, and in the vocabulary's fingerprint
}
_STATISTICS = {"mean", "deviation"}
_VOCABULARY, _EXTENDS = "vocabulary", "extends"
_SHORT_DIGITS = 16  # of the fingerprints of vocabularies that a grown one extends, of which there may be hundreds
_RESOLUTION = 1e-9  # of a deviation: statistics that differ by less give the same float32 values


@dataclass(frozen=True)
class Preprocessing:
    """How the label, the dense columns and the sparse features of a data set were made, each by name.

    Attributes:
        label: the raw ``column`` and how its values become 0 or 1.
        dense: transform, what replaces a missing number, …, and ``mean`` and ``deviation`` if they were standardised.
        sparse: encoding, …, and ``vocabulary``, the fingerprint of the values in the order of their ids, or for a
            hashed feature ``num_embeddings``. Of a vocabulary that has grown also ``extends``, the first digits of the
            fingerprints of those whose ids it kept, the oldest first.
        more_labels: of the labels after the first, if there are several.
    """

    label: Rules
    dense: Mapping[str, Rules]
    sparse: Mapping[str, Rules]
    more_labels: Mapping[str, Rules] = field(default_factory=dict)

    def select(self, dense: Iterable[str], sparse: Iterable[str]) -> "Preprocessing":
        """Return the part for these columns, which must exist."""
        return Preprocessing(
            self.label,
            {name: self.dense[name] for name in dense},
            {name: self.sparse[name] for name in sparse},
            self.more_labels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        plain = asdict(self)
        if not self.more_labels:
            del plain["more_labels"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Preprocessing":
        """Return what ``to_dict`` was called on; KeyError, TypeError or ValueError if it is something else."""
        label, dense, sparse = (dict(plain[key]) for key in ("label", "dense", "sparse"))
        by_name = dense, sparse, dict(plain.get("more_labels", {}))
        return cls(label, *({name: dict(rules) for name, rules in each.items()} for each in by_name))

    def by_column(self) -> dict[str, Rules]:
        """Return the rules of all columns by a name for messages, such as ``dense column price``."""
        return {
            "the label": self.label,
            **{f"label {name}": rules for name, rules in self.more_labels.items()},
            **{f"dense column {name}": rules for name, rules in self.dense.items()},
            **{f"sparse feature {name}": rules for name, rules in self.sparse.items()},
        }


LIKE_REMEDY = (
    "use the data set that the model was trained on, or prepare this one with --like and that data set "
    "(see `mlet prepare --help`)"
)
"""What to do about a vocabulary, or a mean and deviation, of another data set."""


class Difference(NamedTuple):
    """How a column of two data sets or models was made differently, and what the user can do, as texts."""

    text: str
    remedy: str


def label_rules(label: Any) -> dict[str, Any]:
    """Return the rules of a label column, a dataclass; its raw column is part of what a label means."""
    return _rules(label, {"name"})


def dense_rules(column: Any, **statistics: float) -> dict[str, Any]:
    """Return the rules of a dense column, a dataclass, with what was computed from the training split."""
    return _rules(column, _DENSE_OMITTED) | statistics


def sparse_rules(column: Any, vocabulary: str | None, extends: Sequence[str] = ()) -> dict[str, Any]:
    """Return the rules of a sparse column, a dataclass.

    Args:
        column: the description of the column.
        vocabulary: the fingerprint of its vocabulary; None if it is hashed.
        extends: of the vocabularies that it has grown from, as ``grown_from`` returns them.
    """
    rules = _rules(column, _SPARSE_OMITTED)
    if rules.get("cast") == "text":  # makes of numbers the texts that other files hold
        del rules["cast"]
    if "max_len" not in rules:
        rules.pop("keep", None)
    if vocabulary is None:
        return rules
    return rules | {_VOCABULARY: vocabulary} | ({_EXTENDS: list(extends)} if extends else {})


def grown_from(rules: Rules) -> list[str]:
    """Return what a vocabulary that grows from the one in ``rules`` extends: that one, and all that it extends."""
    return [*rules.get(_EXTENDS, ()), rules[_VOCABULARY][:_SHORT_DIGITS]]


def extends(rules: Rules, other: Rules) -> bool:
    """Return whether a feature's vocabulary has grown from that of ``other``, whose ids mean the same in both."""
    return other.get(_VOCABULARY, "")[:_SHORT_DIGITS] in rules.get(_EXTENDS, ())


Relation = Literal["same", "extends", "either"]
"""Which vocabularies fit: the same one; also one that extends the wanted one; or one that it extends, too."""


def find_difference(
    found: Preprocessing, wanted: Preprocessing, here: str, there: str, vocabularies: Relation = "same"
) -> Difference | None:
    """Return how columns of ``wanted`` were made differently in ``found``, which has them all; None if they were not.

    Args:
        found: of the data at hand.
        wanted: of the model; its columns are in ``found``, too, and its labels if they are the same.
        here, there: where the two are, for the message, such as ``here`` and ``in the model's data set``.
        vocabularies: which of ``found`` fit those of ``wanted``.
    """
    differing = {}
    others = found.by_column()
    for column, rules in wanted.by_column().items():
        keys = _differing_keys(others.get(column, {}), rules, vocabularies)
        if keys:
            differing[column] = keys
    if not differing:
        return None
    column, keys = next(iter(differing.items()))
    more = f" (and {len(differing) - 1} more made differently)" if len(differing) > 1 else ""
    if keys == [_VOCABULARY]:
        text = f"the ids of {column} belong to another vocabulary {here} than {there}{more}"
        return Difference(text, LIKE_REMEDY)
    keys = [key for key in keys if key != _VOCABULARY]
    one, other = _show(others.get(column, {}), wanted.by_column()[column], keys)
    text = f"{column} has {one} {here} and {other} {there}{more}"
    if set(keys) <= _STATISTICS:  # which nobody can set, since they come from each data set's own training split
        return Difference(text, LIKE_REMEDY)
    return Difference(text, "prepare both data sets in the same way")


def _rules(column: Any, omitted: set[str]) -> dict[str, Any]:
    # Without what is None, so that a later version's field equals its absence in data of an earlier one.
    return {key: _plain(value) for key, value in asdict(column).items() if key not in omitted and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value) if isinstance(value, Fraction) else value


def _differing_keys(found: Rules, wanted: Rules, vocabularies: Relation) -> list[str]:
    fits = (vocabularies != "same" and extends(found, wanted)) or (vocabularies == "either" and extends(wanted, found))
    # What else a vocabulary extends does not change what its ids mean.
    omitted = {_EXTENDS, _VOCABULARY} if fits else {_EXTENDS}
    keys = (key for key in dict.fromkeys([*wanted, *found]) if key not in omitted)
    return [key for key in keys if not _is_same(key, found, wanted)]


def _is_same(key: str, found: Rules, wanted: Rules) -> bool:
    if key in _STATISTICS and key in found and key in wanted:
        scale = abs(wanted.get("deviation", 1.0))
        return bool(abs(found[key] - wanted[key]) <= _RESOLUTION * scale)
    return bool(found.get(key) == wanted.get(key))


def _show(found: Rules, wanted: Rules, keys: list[str]) -> tuple[str, str]:
    """Return both columns' rules of these keys as texts that differ."""
    short = _shown(found, keys, digits=6), _shown(wanted, keys, digits=6)
    return short if short[0] != short[1] else (_shown(found, keys, digits=17), _shown(wanted, keys, digits=17))


def _shown(rules: Rules, keys: list[str], digits: int) -> str:
    texts = []
    for key in keys:
        if key in rules:
            value = rules[key]
            number = f"{value:.{digits}g}" if isinstance(value, float) else None
            texts.append(f"{key} {number or (value if isinstance(value, str) else to_json(value))}")
    return ", ".join(texts) or f"no {' and no '.join(keys)}"
