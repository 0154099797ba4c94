"""The config of a multi-layer table: TorchRec's EmbeddingBagConfig with the width of W1, or widths by range of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
    data_type_to_dtype,
)

from mlet_dist.embeddings.initializers import GivenInitializer, ProjectionInit, RowInitializer, StoredRowInitializer
from mlet_dist.embeddings.row_order import RowOrder


class RowRange(NamedTuple):
    """Consecutive rows of a table that are stored with the same number of columns.

    Attributes:
        rows: their number.
        width: the columns of W1; rows of width 0 are not stored.
        share: the share of the table's lookups that is expected for them, for estimates of costs.
    """

    rows: int
    width: int
    share: float = 1.0


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a table that are stored together in one table, its own or a pool.

    Attributes:
        table: the table that the model sees.
        index: the number of the range in ``table``; None for a table without ranges.
        first_row: the first of its rows in ``table``.
        rows: their number.
        offset: the first of its rows in the table that stores them.
        features: the features of ``table``.
        shared_by: the ids after them that read the last of its rows, because they have none of their own.
        share: the share of the lookups of ``table`` that is expected for them.
    """

    table: str
    index: int | None
    first_row: int
    rows: int
    offset: int
    features: tuple[str, ...]
    share: float = 1.0
    shared_by: int = 0

    @property
    def name(self) -> str:
        """The name of its W2 in the state dict."""
        return self.table if self.index is None else f"{self.table}:{self.index}"


def check_ranges(table: str, ranges: Sequence[RowRange], num_embeddings: int) -> None:
    """Raise ValueError unless the ranges have positive sizes, cover a table exactly, and store some rows."""
    for index, (rows, width, _) in enumerate(ranges):
        if rows < 1 or width < 0:
            raise ValueError(
                f"table {table!r}: row range {index} has {rows} rows of width {width}; it needs one row at least, and "
                "a width of 0 or more"
            )
    total = sum(rows for rows, _, _ in ranges)
    if total != num_embeddings:
        raise ValueError(f"table {table!r}: its row ranges have {total} rows, and num_embeddings is {num_embeddings}")
    if not any(width for _, width, _ in ranges):
        raise ValueError(f"table {table!r}: no row range has a width above 0")


@dataclass
class MultiLayerEmbeddingBagConfig(EmbeddingBagConfig):
    """TorchRec's EmbeddingBagConfig with the width k of the first layer.

    ``embedding_dim`` stays d, the width that the model receives. With ``data_type`` FP16 both W1 and the served table
    are stored in half precision; W2 stays float32. W1 is drawn uniformly from [``weight_init_min``,
    ``weight_init_max``), by default ±1/sqrt(num_embeddings), or by ``init_fn`` if one is given.

    Args:
        hidden_dim: k, the width of W1; None trains a plain single-layer table.
        rows_init_std: if given, W1 is drawn from N(0, rows_init_std^2) instead.
        projection_init_std: standard deviation of W2's initial values; None means 1/sqrt(k), which has unit gain. That
            of a range of w columns is sqrt(k/w) times as large, for the same gain.
        projection_init: ``normal``, or ``orthogonal``, of the same scale (see ``Projection``).
        zero_first_row: whether row 0 of W1 begins at zero, for tables whose id 0 stands for values that training never
            sees: the row W[0] that is served for them is then zero, and not random.
        row_ranges: ranges of rows of different widths (see ``row_ranges``). None stores all rows with ``hidden_dim``
            columns.
        shared_row: whether ids of a last range of width 0 read the row before it, which they share, instead of zero.
        segments: the ranges of other tables whose rows this one stores (``row_ranges.tables_of_rows``).
        num_buckets: for a pool of adaptive tables, the number of equal parts of which ranks own whole ones
            (``slot_layout``); 0 for other tables.
        moving_rows: for one of these pools, the rows of all adaptive tables, each of which has a slot and a utility.

    Raises:
        ValueError: a dimension is below 1, ``data_type`` is neither FP32 nor FP16, ``zero_first_row`` comes with an
            ``init_fn``, or the ranges do not cover the table. The message names the table.
    """

    hidden_dim: int | None = None
    rows_init_std: float | None = None
    projection_init_std: float | None = None
    projection_init: ProjectionInit = "normal"
    zero_first_row: bool = False
    row_ranges: Sequence[RowRange] | None = None
    shared_row: bool = False
    segments: tuple[Segment, ...] = ()
    num_buckets: int = 0
    moving_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "embedding_dim", "hidden_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"table {self.name!r}: {name} is {value}, it must be at least 1")
        if self.data_type not in (DataType.FP32, DataType.FP16):
            raise ValueError(f"table {self.name!r}: data_type is {self.data_type.name}; rows are FP32 or FP16")
        if self.zero_first_row and self.init_fn is not None:
            raise ValueError(f"table {self.name!r}: zero_first_row cannot go with an init_fn")
        if self.row_ranges is not None:
            self.row_ranges = tuple(RowRange(*each) for each in self.row_ranges)
            check_ranges(self.name, self.row_ranges, self.num_embeddings)
            if self.shared_row and any(not each.width for each in self.row_ranges[:-1]):
                raise ValueError(
                    f"table {self.name!r}: shared_row needs a range of width 0 to be the last one; the widths are "
                    f"{[each.width for each in self.row_ranges]}"
                )

    @property
    def row_width(self) -> int:
        """The columns of W1: k, or d for a single-layer table."""
        return self.hidden_dim if self.hidden_dim is not None else self.embedding_dim

    @property
    def row_order(self) -> RowOrder | None:
        """The order in which W1's rows are stored; None for pools of adaptive tables, whose rows have slots."""
        if self.num_buckets:
            return None
        return RowOrder(tuple(segment.rows for segment in self.segments) or (self.num_embeddings,))

    def rows_config(self, seed: int) -> EmbeddingBagConfig:
        """Return the TorchRec config of W1: ``row_width`` columns, initial values fixed by seed, table and row."""
        plain = self.plain_config()
        plain.embedding_dim = self.row_width
        if self.segments:
            return plain
        order = RowOrder((self.num_embeddings,))
        if self.init_fn is not None:
            plain.init_fn = GivenInitializer(order, self.init_fn)
            return plain
        by_id = row_initializer(self, self.name, self.num_embeddings, seed, zero_first_row=self.zero_first_row)
        plain.init_fn = StoredRowInitializer(order, (by_id,))
        return plain

    def plain_config(self) -> EmbeddingBagConfig:
        """Return the TorchRec config of the served table, which has d columns."""
        names = [field.name for field in fields(EmbeddingBagConfig) if field.init]
        return EmbeddingBagConfig(**{name: getattr(self, name) for name in names})


def row_initializer(
    table: MultiLayerEmbeddingBagConfig, name: str, rows: int, seed: int, *, zero_first_row: bool
) -> RowInitializer:
    """Return the initial values of ``rows`` rows, drawn as ``table``'s for its number of rows, under ``name``."""
    low, high = table.get_weight_init_min(), table.get_weight_init_max()
    return RowInitializer(
        f"embedding_bags.{name}",
        rows,
        "uniform" if table.rows_init_std is None else "normal",
        scale=(high - low) / 2 if table.rows_init_std is None else table.rows_init_std,
        seed=seed,
        center=(high + low) / 2 if table.rows_init_std is None else 0.0,
        dtype=data_type_to_dtype(table.data_type),
        zero_first_row=zero_first_row,
    )


@dataclass
class MultiLayerEmbeddingConfig(EmbeddingConfig):
    """TorchRec's EmbeddingConfig, of a table whose rows are not pooled, with the width k of the first layer.

    Args:
        hidden_dim, rows_init_std, projection_init_std, projection_init, zero_first_row: as in
            ``MultiLayerEmbeddingBagConfig``.

    Raises:
        ValueError: as in ``MultiLayerEmbeddingBagConfig``.
    """

    hidden_dim: int | None = None
    rows_init_std: float | None = None
    projection_init_std: float | None = None
    projection_init: ProjectionInit = "normal"
    zero_first_row: bool = False

    def __post_init__(self) -> None:
        as_multi_layer(self)  # checks the values


def as_multi_layer(config: BaseEmbeddingConfig) -> MultiLayerEmbeddingBagConfig:
    """Return a config of TorchRec's as that of a single-layer table, and a multi-layer config as it is.

    An EmbeddingConfig, whose rows are not pooled, becomes one with pooling NONE.
    """
    if isinstance(config, MultiLayerEmbeddingBagConfig):
        table = config
    else:
        names = {field.name for field in fields(MultiLayerEmbeddingBagConfig)} & {each.name for each in fields(config)}
        values = {name: getattr(config, name) for name in names}
        if isinstance(config, EmbeddingConfig):
            values["pooling"] = PoolingType.NONE
        table = MultiLayerEmbeddingBagConfig(**values)
        limits = {"a": table.get_weight_init_min(), "b": table.get_weight_init_max()}
        if (
            isinstance(table.init_fn, partial)
            and table.init_fn.func is nn.init.uniform_
            and not table.init_fn.args
            and table.init_fn.keywords == limits
        ):
            table.init_fn = None  # TorchRec's default, which draws different values on every rank
    if not table.feature_names:
        table.feature_names = [table.name]
    return table


def plain_sequence_config(table: MultiLayerEmbeddingBagConfig) -> EmbeddingConfig:
    """Return the TorchRec config of the served table of a collection whose rows are not pooled."""
    return EmbeddingConfig(
        **{field.name: getattr(table, field.name) for field in fields(EmbeddingConfig) if field.init}
    )
