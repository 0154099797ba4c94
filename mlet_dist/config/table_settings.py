"""Settings of single tables, by name or pattern, and what the section `model` makes of one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from mlet_dist.config.limits import MAX_COLUMNS, SCALE
from mlet_dist.config.parser import did_you_mean, setting
from mlet_dist.errors import UserError

Pooling = Literal["sum", "mean"]
RowsInit = Literal["uniform", "normal"]
ProjectionInit = Literal["normal", "orthogonal"]

_Entry = TypeVar("_Entry")
_WILDCARDS = "*?["


@dataclass(frozen=True)
class TableModelConfig:
    """The sizes and initial values of single tables; null takes the setting of the same name for all tables."""

    embedding_dim: int | None = setting(
        "model.embedding_dim for these tables. dlrm and deepfm take dot products of all vectors, which need one.",
        None,
        at_least=1,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )
    hidden_dim: int | Literal["default"] | None = setting(
        "k of these tables; null: single-layer tables, without W2. default: model.hidden_dim, but null for those that "
        "model.single_layer_up_to names.",
        "default",
        at_least=1,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )
    pooling: Pooling | None = setting("model.pooling for these tables.", None)
    rows_init: RowsInit | None = setting("model.rows_init for these tables.", None)
    rows_init_std: float | None = setting("model.rows_init_std for these tables.", None, **SCALE)
    rows_init_gain: float | None = setting("model.rows_init_gain for these tables.", None, **SCALE)
    projection_init: ProjectionInit | None = setting("model.projection_init for these tables.", None)
    projection_init_std: float | None = setting("model.projection_init_std for these tables.", None, **SCALE)


@dataclass(frozen=True)
class TableSettings:
    """The sizes and initial values of one table, with nothing left to other settings.

    Attributes:
        embedding_dim: d.
        hidden_dim: k; None for a single-layer table.
        pooling, rows_init, rows_init_std, rows_init_gain, projection_init_std: as in the section `model`.
        projection_init: as there; models of earlier versions record none.
    """

    embedding_dim: int
    hidden_dim: int | None
    pooling: Pooling
    rows_init: RowsInit
    rows_init_std: float
    rows_init_gain: float
    projection_init_std: float | None
    projection_init: ProjectionInit = "normal"

    @property
    def row_width(self) -> int:
        """The columns of W1: k, or d of a single-layer table."""
        return self.embedding_dim if self.hidden_dim is None else self.hidden_dim


def matching_entries(entries: Mapping[str, _Entry], table: str) -> list[_Entry]:
    """Return the entries that apply to a table: that of its name, and then those whose patterns match, in order.

    A setting is that of the first entry which has it.
    """
    own = [entries[table]] if table in entries else []
    return own + [each for name, each in entries.items() if name != table and _is_match(table, name)]


def check_entries(key: str, entries: Mapping[str, object], tables: Sequence[str]) -> None:
    """Raise UserError if an entry, of the section ``key``, names no table or is a pattern that matches none."""
    for name in entries:
        if name not in tables and not any(_is_match(table, name) for table in tables):
            what = f"no table matches {name!r}" if set(name) & set(_WILDCARDS) else f"the model has no table {name!r}"
            raise UserError(f"{key}: {what}{did_you_mean(name, tables)}; it has {', '.join(tables)}")


def _is_match(table: str, pattern: str) -> bool:
    return bool(set(pattern) & set(_WILDCARDS)) and fnmatchcase(table, pattern)
