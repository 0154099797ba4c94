"""The description of a raw table and of the features to make from it (``TableSpec``), and those of Criteo and Avazu.

To add a format with fixed columns, write a function like ``criteo``, add it to ``RAW_FORMATS``, and add its name to the
choices of the argument ``format`` in ``mlet_dist/cli/prepare.py``; ``--split paper`` is mapped to a rule in
``prepare_arguments``. Files that are neither lines of text nor Parquet also need a function in ``raw_blocks`` that cuts
them into blocks and one in ``parsing`` that reads a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mlet_dist.data.prepare.splits import PAPER_AVAZU, SplitRule

MAX_MIN_COUNT = 2**63 - 1  # counts are int64
LABEL = "label"


@dataclass(frozen=True)
class TextFormat:
    """Lines of delimited fields.

    Attributes:
        delimiter: one character, or several.
        quote: the character around fields that contain a delimiter, doubled within such a field; None makes quotes
            ordinary characters. A quoted field cannot contain a line end.
        header: whether the first line of each file names the columns.
        columns: names of all columns, in order. With a header it is the expected header, or None if each file may have
            columns of its own.
        encoding: name of the text's encoding; None is UTF-8. A byte order mark takes precedence over it.
    """

    delimiter: str
    quote: str | None
    header: bool
    columns: tuple[str, ...] | None
    encoding: str | None = None


@dataclass(frozen=True)
class JsonLines:
    """Lines of JSON objects, whose keys are the columns; a key that an object lacks is a missing value.

    Attributes:
        encoding: as in ``TextFormat``.
    """

    encoding: str | None = None


@dataclass(frozen=True)
class LabelColumn:
    """The label column. Without a mapping, 0, 1, false and true are labels; another number is an error.

    Attributes:
        column: name of the raw column.
        positive_from: labels are numbers, of which those from this one on become 1 and the others 0.
        positive: the values that become 1; others become 0. White space, leading zeros and ``.0`` do not matter.
        negative: the values that become 0, so that rows with values in neither list are malformed.
        missing_values: as in ``DenseColumn``; a row without the label is malformed, unless ``missing`` says otherwise.
        name: name of the label; None where it is the only one, which is called ``label``.
        missing: ``unknown``: a row may lack this one of several labels, and has no part in its loss and metrics.
    """

    column: str
    positive_from: float | None = None
    positive: tuple[str, ...] | None = None
    negative: tuple[str, ...] | None = None
    missing_values: tuple[str, ...] | None = None
    name: str | None = None
    missing: Literal["unknown"] | None = None

    @property
    def column_name(self) -> str:
        """The name of the column in the data set."""
        return self.name or LABEL


@dataclass(frozen=True)
class DenseColumn:
    """A column of numbers that becomes a dense feature.

    Attributes:
        name: name of the feature.
        column: name of the raw column.
        transform: ``log1p`` is log(1 + max(x, 0)); ``standardise`` subtracts the training split's mean and divides by
            its standard deviation; ``raw`` keeps the number.
        missing: the number that replaces a missing one, before the transform; ``mean``, the training split's mean (with
            ``standardise`` only); or ``refuse``, which makes the row malformed.
        integer: whether numbers that are not integers make a row malformed.
        missing_values: the spellings of a missing number besides the empty text; None for the usual ones
            (``raw_values.MISSING_NUMBERS``).
    """

    name: str
    column: str
    transform: Literal["log1p", "standardise", "raw"]
    missing: float | Literal["mean", "refuse"] = 0.0
    integer: bool = False
    missing_values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SparseColumn:
    """A column of categories that becomes a sparse feature. A missing value counts as the empty text.

    Attributes:
        name: name of the feature.
        column: name of the raw column.
        table: name of the embedding table, which features may share, and with it their vocabulary; None for a table of
            the feature's own name.
        encoding: with ``vocabulary``, ids are ranks of frequency in the training split: 1 is the most frequent value,
            ties are ordered by their UTF-8 bytes, and values with fewer than ``min_count`` occurrences have id 0.
            With ``hash``, the id is the value's hash (``mlet_dist.data.hashing``, salted with the table's name)
            modulo ``num_embeddings``.
        min_count: see ``encoding``.
        num_embeddings: see ``encoding``; None with ``vocabulary``.
        max_num_embeddings: the largest number of rows of the table with ``vocabulary``; the rarest beyond it have
            id 0. None for no limit.
        multi_valued: whether a row holds a list: a list of a Parquet file, or a text that is split at ``separator`` or
            stands in brackets. A missing or empty list has no values; missing and empty elements are left out.
        separator: see ``multi_valued``; None for lists of Parquet files, and for texts that all stand in brackets.
        weights: name of the raw column with the weights of the values, lists of the same lengths; or None.
        weight_separator: the text between a value and its weight where each element is a pair such as ``a:0.5``; or
            None.
        max_len: the largest number of values of a row, None for no limit; ``keep`` says which of them stay.
        keep: see ``max_len``.
        cast: ``integer``: values are whole numbers, others make a row malformed, and 7, 007 and 7.0 are the same value;
            ``text``: numbers of Parquet files are values as they stand in CSV files; None: texts as they are, and whole
            numbers.
        missing_values: the spellings of a missing value besides the empty text; None for the usual ones
            (``raw_values.MISSING_NUMBERS`` with ``cast: integer``, else ``MISSING_TEXTS``).
    """

    name: str
    column: str
    encoding: Literal["vocabulary", "hash"] = "vocabulary"
    min_count: int = 1
    num_embeddings: int | None = None
    max_num_embeddings: int | None = None
    multi_valued: bool = False
    separator: str | None = None
    weights: str | None = None
    weight_separator: str | None = None
    max_len: int | None = None
    keep: Literal["first", "last"] = "first"
    cast: Literal["text", "integer"] | None = None
    missing_values: tuple[str, ...] | None = None
    table: str | None = None

    @property
    def table_name(self) -> str:
        """The name of the embedding table."""
        return self.table or self.name

    @property
    def weighted(self) -> bool:
        """Whether the values of a row have weights."""
        return self.weights is not None or self.weight_separator is not None


@dataclass(frozen=True)
class TableSpec:
    """The description of a raw table and of the features to make from it.

    Attributes:
        source: name of the format: a key of ``RAW_FORMATS``, or ``table``.
        text: how lines are read; None for Parquet files.
        label, dense, sparse: the columns to keep, and the features to make from them.
        more_labels: the labels after the first.
        split: the rule by which rows are assigned to splits.
        max_malformed: largest share of malformed lines in a file. A larger share is an error at the end of the file, or
            before it once the malformed lines exceed this share of the lines read and of 10 million lines. Ten
            malformed lines are always allowed, even if it is 0, unless the file has no other lines.
        sample_weight: name of the raw column with each row's weight in the loss and in metrics, 0 or more; or None.
    """

    source: str
    text: TextFormat | JsonLines | None
    label: LabelColumn
    dense: tuple[DenseColumn, ...]
    sparse: tuple[SparseColumn, ...]
    split: SplitRule
    max_malformed: float = 0.1
    sample_weight: str | None = None
    more_labels: tuple[LabelColumn, ...] = ()

    @property
    def labels(self) -> tuple[LabelColumn, ...]:
        """All labels, in order."""
        return self.label, *self.more_labels

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The names of the raw columns to read, each once."""
        weight = [] if self.sample_weight is None else [self.sample_weight]
        wanted = [*(each.column for each in self.labels), *weight, *(d.column for d in self.dense)]
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
    """Return the description of Criteo-Kaggle and of Criteo-1TB's day files: tab-separated, no header, in time order.

    A line holds a label, 13 integers I1-I13 (log1p; a missing one is 0) and 26 categorical values C1-C26.
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
    """Return the description of Avazu: comma-separated, with a header; 22 categorical features, no dense ones."""
    return TableSpec(
        source="avazu",
        text=TextFormat(delimiter=",", quote=None, header=True, columns=AVAZU_COLUMNS),
        label=LabelColumn("click"),
        dense=(),
        sparse=tuple(SparseColumn(name, name, min_count=min_count) for name in AVAZU_SPARSE),
        split=split or PAPER_AVAZU,
        max_malformed=max_malformed,
    )


# The formats with fixed columns, by their name on the command line; each function takes min_count.
RAW_FORMATS: Mapping[str, Callable[[int], TableSpec]] = {"criteo": criteo, "avazu": avazu}
