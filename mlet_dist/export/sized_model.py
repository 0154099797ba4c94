"""A trained model at another size: the model that an export holds, made from the run as it is read.

Four ways lead to a size r below d:

- ``columns``: the model was trained at r (``model.nested_dims``), and its network is one of ``model.name``. The tables
  are the first r columns, and the dense layers lose the weights of the others: a plain network of ``embedding_dim`` r.
- ``padded``: it was trained at r, and the network is the user's. It gets vectors of d columns, of which all beyond r
  are zero; rows of r columns are multiplied by a P2 of ones and zeros.
- ``truncated``: it was trained at d alone. Each table keeps the r directions in which the vectors that training looked
  up are longest, and is multiplied by its own P2 ``(r, d)``. A rotation of the columns that all tables share would
  need no P2, but the dense arch ends in a ReLU, which no rotation passes.
- ``graded``: as ``truncated``, with widths that differ between ranges of rows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import SIZE
from mlet_dist.export.formats.safetensors import SafetensorsFiles, SafetensorsFormat
from mlet_dist.export.source import ModelSource
from mlet_dist.models.column_slices import Kept, layer_shapes, layer_slices, sliced
from mlet_dist.stored_tables.refitted_source import RefittedTableSource

FORMAT = SafetensorsFormat()
"""Of the file that holds the ``Size.tensors`` of an export."""

How = Literal["columns", "padded", "truncated", "graded"]


@dataclass(frozen=True)
class RefittedTable:
    """How the rows of a table are refitted: the arguments of ``RefittedTableSource.of``.

    Attributes:
        ranges: of all its rows.
        directions: for each range P2 ``(w, d)`` float32; None for width d or 0.
        shared: the vector ``(d,)`` of the last row that is stored, if ids of a range of width 0 read it.
        lost: the share of the squares of the vectors that training looked up, which the widths lose.
    """

    ranges: tuple[RowRange, ...]
    directions: tuple[torch.Tensor | None, ...]
    shared: torch.Tensor | None = None
    lost: float = 0.0


@dataclass(frozen=True)
class Size:
    """The size of an export, which its manifest records.

    Attributes:
        embedding_dim: r, the columns of the widest rows.
        how: see above.
        tables: of all tables by name, where ``how`` is not ``columns``.
        columns: the nested width whose first columns are ``graded``; None for all columns.
    """

    embedding_dim: int
    how: How
    tables: Mapping[str, RefittedTable] = field(default_factory=dict)
    columns: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the ``tensors``."""
        ranges = {name: [[each.rows, each.width] for each in table.ranges] for name, table in self.tables.items()}
        of_columns = {} if self.columns is None else {"columns": self.columns}
        return {"embedding_dim": self.embedding_dim, "how": self.how, **of_columns, "row_ranges": ranges}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """P2 of each range and the shared row of each table, by names of their own."""
        found = {}
        for name, table in self.tables.items():
            for index, own in enumerate(table.directions):
                if own is not None:
                    found[f"directions.{name}:{index}"] = own.contiguous()
            if table.shared is not None:
                found[f"shared.{name}"] = table.shared.contiguous()
        return found

    @property
    def lost(self) -> dict[str, float]:
        """The share of the squares of looked-up vectors that each table loses, if it was computed."""
        return {name: table.lost for name, table in self.tables.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the ``tensors``."""
        found = hashlib.sha256()
        for name, tensor in self.tensors.items():
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest()

    @classmethod
    def from_manifest(cls, directory: Path, manifest: Mapping[str, Any]) -> "Size | None":
        """Return the size of an export; None if its model has that of the run.

        Args:
            directory: of the export.
            manifest: its manifest.

        Raises:
            UserError: a file is missing or damaged, or the manifest is broken.
        """
        plain = manifest.get(SIZE)
        if plain is None:
            return None
        try:
            tensors = {}
            if "files" in plain:
                with SafetensorsFiles(directory / plain["directory"], plain["files"]) as files:
                    tensors = {name: files.load(name) for name in files.tensors}
            return cls.from_dict(plain, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}: broken manifest: {error!r}; export again") from None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Size":
        """Return the size whose ``to_dict`` and ``tensors`` these are; KeyError or TypeError if they are not."""
        tables = {
            name: RefittedTable(
                tuple(RowRange(int(rows), int(width)) for rows, width in ranges),
                tuple(tensors.get(f"directions.{name}:{index}") for index in range(len(ranges))),
                tensors.get(f"shared.{name}"),
            )
            for name, ranges in plain["row_ranges"].items()
        }
        columns = plain.get("columns")
        return cls(int(plain["embedding_dim"]), plain["how"], tables, None if columns is None else int(columns))


@dataclass(frozen=True)
class SizedSource(ModelSource):
    """A trained model at a size.

    Attributes:
        whole: the model as it was trained.
        size: the size.
    """

    whole: ModelSource
    size: Size

    @property
    def trained(self) -> ModelSource:
        """The model of the run."""
        return self.whole.trained if isinstance(self.whole, SizedSource) else self.whole

    def load_dense(self, name: str) -> torch.Tensor:
        """Load what is left of one tensor of ``dense`` by its state name."""
        tensor = self.whole.load_dense(name)
        return sliced(tensor, self._slices[name]) if name in self._slices else tensor

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless what is left of one of ``dense`` has this shape."""
        self.whole.check_shape(name, self._whole_shapes.get(name, shape))

    @cached_property
    def _slices(self) -> dict[str, Kept]:
        if self.size.how != "columns":
            return {}
        return layer_slices(self.whole.spec, self.size.embedding_dim)

    @cached_property
    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return layer_shapes(self.whole.spec) if self._slices else {}


def at_size(source: ModelSource, size: Size) -> SizedSource:
    """Return a trained model at a size; it shares the open files of ``source``."""
    if size.columns is not None:
        source = at_size(source, Size(size.columns, "columns"))
    spec, r = source.spec, size.embedding_dim
    if size.how == "columns":
        spec = spec.with_embedding_dim(r)
        tables = {name: table.first_columns(r) for name, table in source.tables.items()}
    else:
        tables = {
            name: RefittedTableSource.of(source.tables[name], each.ranges, each.directions, each.shared)
            for name, each in size.tables.items()
        }
    fields_of_source = {each.name: getattr(source, each.name) for each in fields(ModelSource)}
    return SizedSource(**{**fields_of_source, "spec": spec, "tables": tables}, whole=source, size=size)
