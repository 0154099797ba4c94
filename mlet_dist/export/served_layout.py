"""Which TorchRec tables an output holds for each table of the model: plain data, which the manifest records."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlet_dist.export.encoding import Encoding

Form = Literal["all", "kept", "mixed"]
"""``all``: n rows of d columns. ``kept``: the stored rows, of d columns. ``mixed``: narrow ranges with their W2."""


@dataclass(frozen=True)
class ServedPart:
    """Consecutive kept rows of a table that an output holds as one TorchRec table.

    Attributes:
        name: of the TorchRec table.
        first_row: the first of them, in the numbering of the kept rows.
        num_embeddings: the rows of the TorchRec table; the last part has one more than kept rows, the shared row or
            zero, if the table has rows that are not stored.
        embedding_dim: d, or the width of a range of rows.
        projection: the state name of W2 (embedding_dim, d), by which looked-up rows are multiplied; None for d columns.
    """

    name: str
    first_row: int
    num_embeddings: int
    embedding_dim: int
    projection: str | None = None


@dataclass(frozen=True)
class ServedTable:
    """How an output holds a table of the model.

    The rows that are stored, in the order of their ids, are numbered from 0: the *kept* rows. Every other id stands for
    the row behind them, shared or zero, whose number is ``kept``.

    Attributes:
        num_embeddings: n; ids are below it.
        kept: the number of kept rows.
        kept_ids: the state name of their ids, ascending; None if they are the first rows, so that the number of an id
            is min(id, kept).
        embedding_dim: d.
        parts: cover the kept rows and the row behind them.
    """

    num_embeddings: int
    kept: int
    kept_ids: str | None
    embedding_dim: int
    parts: tuple[ServedPart, ...]


@dataclass(frozen=True)
class ServedLayout:
    """How an output holds all tables.

    Attributes:
        form: of all tables.
        tables: by name.
    """

    form: Form
    tables: Mapping[str, ServedTable]

    @property
    def parts(self) -> list[ServedPart]:
        """The TorchRec tables, in order."""
        return [part for table in self.tables.values() for part in table.parts]

    @property
    def tensor_names(self) -> list[str]:
        """The state names of every W2 and of the ids of kept rows."""
        ids = [table.kept_ids for table in self.tables.values()]
        return [name for name in (*(part.projection for part in self.parts), *ids) if name is not None]

    def table_bytes(self, encoding: Encoding) -> int:
        """Return the bytes of all encoded tables without overhead; with every W2, which is float32."""
        return sum(
            part.num_embeddings * encoding.row_bytes(part.embedding_dim)
            + (0 if part.projection is None else projection_bytes(part.embedding_dim, table.embedding_dim))
            for table in self.tables.values()
            for part in table.parts
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "form": self.form,
            "embedding_dim": max(table.embedding_dim for table in self.tables.values()),
            "tables": {name: asdict(table) for name, table in self.tables.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "ServedLayout":
        """Return the layout that ``to_dict`` was called on; raise KeyError or TypeError if it is none."""
        of_all = {"embedding_dim": plain["embedding_dim"]}  # all that earlier versions recorded of d
        return cls(
            plain["form"],
            {
                name: ServedTable(**{**of_all, **table, "parts": tuple(ServedPart(**part) for part in table["parts"])})
                for name, table in plain["tables"].items()
            },
        )


def projection_bytes(width: int, embedding_dim: int) -> int:
    """Return the bytes of a W2 ``(width, embedding_dim)``, float32."""
    return 4 * width * embedding_dim
