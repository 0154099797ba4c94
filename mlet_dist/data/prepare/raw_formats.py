"""What a raw table holds and what becomes of its columns; the known formats are Criteo's and Avazu's."""

from dataclasses import dataclass
from typing import Literal

from mlet_dist.data.prepare.splits import PAPER_AVAZU, SplitRule

MAX_MIN_COUNT = 2**63 - 1  # counts are int64
LABEL = "label"


@dataclass(frozen=True)
class TextFormat:
    """Lines of delimited fields.

    Attributes:
        delimiter: one character.
        quote: the character around fields that hold a delimiter, doubled within; None where quotes are ordinary. A
            quoted field ends on its line.
        header: whether the first line of each file names the columns.
        columns: their names in order; where there is a header, None.
    """

    delimiter: str
    quote: str | None
    header: bool
    columns: tuple[str, ...] | None


@dataclass(frozen=True)
class LabelColumn:
    """The column of 0 and 1, or of numbers of which those from ``positive_from`` on become 1 and the others 0."""

    column: str
    positive_from: float | None = None


@dataclass(frozen=True)
class DenseColumn:
    """A column of numbers that becomes a dense feature.

    Attributes:
        transform: ``log1p`` of the number, negative ones taken for 0; ``standardise`` by mean and deviation of the
            training split; ``raw``.
        missing: the number in place of one that is missing (before the transform), ``mean`` (of the training split,
            with standardise only), or ``refuse``: the row is malformed.
        integer: whether a number with a point is malformed.
    """

    name: str
    column: str
    transform: Literal["log1p", "standardise", "raw"]
    missing: float | Literal["mean", "refuse"] = 0.0
    integer: bool = False


@dataclass(frozen=True)
class SparseColumn:
    """A column of texts or integers that becomes a sparse feature; missing is the empty text, a value like any other.

    Attributes:
        encoding: ``vocabulary``: id 1 is the value that is most frequent in the training split, ties in the order of
            their UTF-8 bytes; a value seen there fewer than ``min_count`` times has id 0. ``hash``: the id is the
            value's hash (``mlet_dist.data.hashing``, salted with the feature's name) modulo ``num_embeddings``.
        multi_valued: a row holds a list: of a Parquet file's list, or in a text the pieces between ``separator``; where
            it is missing or empty, the empty list.
        weights: column of the values' weights, a list of the same length.
        integer: whether other texts than whole numbers are malformed; 7 and 007 are then one value.
    """

    name: str
    column: str
    encoding: Literal["vocabulary", "hash"] = "vocabulary"
    min_count: int = 1
    num_embeddings: int | None = None
    multi_valued: bool = False
    separator: str | None = None
    weights: str | None = None
    integer: bool = False


@dataclass(frozen=True)
class TableSpec:
    """All that the pass over a raw table must know.

    Attributes:
        source: ``criteo``, ``avazu`` or ``table``.
        text: how lines are cut into fields; None for Parquet files.
        label, dense, sparse, split: what becomes of the columns; the others are not kept.
        max_malformed: share of malformed lines in a file above which it is an error at the file's end, and before it
            once they are more than this share of what is read and of 10 million lines. Ten of them are always allowed,
            with 0 too, unless the file has no other lines.
    """

    source: str
    text: TextFormat | None
    label: LabelColumn
    dense: tuple[DenseColumn, ...]
    sparse: tuple[SparseColumn, ...]
    split: SplitRule
    max_malformed: float = 0.1

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the raw columns that are read, each once."""
        wanted = [self.label.column, *(d.column for d in self.dense)]
        for feature in self.sparse:
            wanted += [feature.column] if feature.weights is None else [feature.column, feature.weights]
        return tuple(dict.fromkeys([*wanted, *([] if self.split.column is None else [self.split.column])]))


CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_SPARSE = tuple(f"C{i}" for i in range(1, 27))
CRITEO_COLUMNS = ("label", *CRITEO_DENSE, *CRITEO_SPARSE)

_AVAZU_PLACES = "C1 banner_pos site_id site_domain site_category app_id app_domain app_category"
_AVAZU_DEVICE = "device_id device_ip device_model device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
AVAZU_SPARSE = ("hour", *_AVAZU_PLACES.split(), *_AVAZU_DEVICE.split())
AVAZU_COLUMNS = ("id", "click", *AVAZU_SPARSE)


def criteo(min_count: int = 1, split: SplitRule | None = None, max_malformed: float = 0.1) -> TableSpec:
    """Criteo-Kaggle, or day-files of Criteo-1TB: tab-separated, without header or quotes, in time order.

    A line holds a label, 13 integers I1-I13 (log1p; missing is 0) and 26 categorical values C1-C26.
    """
    return TableSpec(
        source="criteo",
        text=TextFormat(delimiter="\t", quote=None, header=False, columns=CRITEO_COLUMNS),
        label=LabelColumn("label"),
        dense=tuple(DenseColumn(name, name, "log1p", 0.0, integer=True) for name in CRITEO_DENSE),
        sparse=tuple(SparseColumn(name, name, min_count=min_count) for name in CRITEO_SPARSE),
        split=split or SplitRule("rows"),
        max_malformed=max_malformed,
    )


def avazu(min_count: int = 1, split: SplitRule | None = None, max_malformed: float = 0.1) -> TableSpec:
    """Avazu: comma-separated with a header; 22 categorical features, ``hour`` (YYMMDDHH) among them, none dense."""
    return TableSpec(
        source="avazu",
        text=TextFormat(delimiter=",", quote=None, header=True, columns=AVAZU_COLUMNS),
        label=LabelColumn("click"),
        dense=(),
        sparse=tuple(SparseColumn(name, name, min_count=min_count) for name in AVAZU_SPARSE),
        split=split or PAPER_AVAZU,
        max_malformed=max_malformed,
    )
