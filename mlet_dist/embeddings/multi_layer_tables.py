"""What the two collections of multi-layer tables share: the tables, their W2, and their product W1·W2."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torchrec.distributed.utils import none_throws
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from mlet_dist.embeddings.collapse import block_rows, collapse_rows
from mlet_dist.embeddings.initializers import LeftUndrawn
from mlet_dist.embeddings.projection import Projection
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, Segment


class MultiLayerTables(nn.Module):
    """Base of the unsharded collections, whose tables are trained as W = W1·W2, with W1 ``(n, k)`` and W2 ``(k, d)``.

    Attributes:
        rows_name: in the state dict W1 is ``<rows_name>.<table>.weight``.
        projections: the W2 of each table that has one, or of its ranges or chunks.
        seed: with table and row it determines the initial values.
        adaptive: given if rows of tables with row ranges move between widths.
    """

    rows_name: ClassVar[str]
    projections: nn.ModuleDict
    seed: int
    adaptive: AdaptiveRows | None
    _is_weighted: bool
    _tables: list[MultiLayerEmbeddingBagConfig]
    _row_tables: list[MultiLayerEmbeddingBagConfig]
    _rows_configs: list[EmbeddingBagConfig]

    def table_configs(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables' configs, whose ``embedding_dim`` is d; pooling NONE marks those that are not pooled."""
        return list(self._tables)

    def row_tables(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables that store the rows, which the sharding plan and the state dict name.

        They are the tables themselves, but pools for those with row ranges (``row_ranges.tables_of_rows``).
        """
        return list(self._row_tables)

    def row_weight(self, table: str) -> nn.Parameter:
        """Return the W1 of one of ``row_tables``."""
        return self.get_parameter(f"{self.rows_name}.{table}.weight")

    def leave_rows_undrawn(self) -> None:
        """Let ``reset_parameters``, also that of the sharded module, leave the rows of all tables as they are.

        For a module whose rows are all loaded from a checkpoint, since drawing many takes minutes.
        """
        for table in self._rows_configs:
            table.init_fn = LeftUndrawn()

    def rows(self) -> EmbeddingBagCollection:
        """Return the first layer alone: a plain collection of W1 over the same parameters, with sum pooling.

        TorchRec's row-wise mean pooling is wrong where tables of several sharding types share a collection or a
        feature, so the sharded module applies the mean itself.
        """
        tables = [dataclasses.replace(table, pooling=PoolingType.SUM) for table in self._rows_configs]
        rows = EmbeddingBagCollection(tables, self._is_weighted, torch.device("meta"))
        rows.embedding_bags = self.get_submodule(self.rows_name)
        return rows

    def _check_rows_stay(self, problem: str) -> None:
        if self.adaptive is not None:
            raise NotImplementedError(
                f"a collection whose rows move between widths {problem} before it is sharded; shard it, or leave "
                "`adaptive` out"
            )

    def _fill_collapsed(self, plain: Mapping[str, torch.Tensor]) -> None:
        """Fill the weights ``(n, d)`` of the served tables with W1·W2, in place.

        Raises:
            NotImplementedError: the collection is adaptive.
        """
        self._check_rows_stay("cannot be collapsed")
        weights = projection_weights(self.projections)
        for whole in plain.values():
            whole.zero_()  # rows that are not stored
        for stored in self._row_tables:
            for segment in segments_of([stored]):
                whole = plain[segment.table]
                stop = segment.first_row + segment.rows
                self._collapse_segment(stored, segment, weights.get(segment.name), whole[segment.first_row : stop])
                whole[stop : stop + segment.shared_by] = whole[stop - 1]

    def _collapse_segment(
        self,
        stored: MultiLayerEmbeddingBagConfig,
        segment: Segment,
        projection: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Fill ``out`` ``(rows, d)`` with the served rows of a segment of a stored table, by id."""
        weight, order = self.row_weight(stored.name), none_throws(stored.row_order)
        step = block_rows(weight.shape[1], out.shape[1])
        for start in range(0, segment.rows, step):
            stop = min(start + step, segment.rows)
            ids = torch.arange(segment.offset + start, segment.offset + stop, device="cpu")
            rows = weight[order.stored_rows(ids).to(weight.device)]
            out[start:stop].copy_(rows if projection is None else collapse_rows(rows, projection))


def check_names(tables: Sequence[MultiLayerEmbeddingBagConfig]) -> None:
    """Raise ValueError if a module of torch cannot have the name of a table."""
    for table in tables:
        if not table.name or "." in table.name or hasattr(nn.ModuleDict, table.name):
            raise ValueError(f"table {table.name!r}: no module of torch can have this name; choose another")


def build_projections(
    tables: list[MultiLayerEmbeddingBagConfig],
    seed: int,
    device: torch.device | None,
    adaptive: AdaptiveRows | None = None,
) -> nn.ModuleDict:
    """Build one Projection for each multi-layer table, keyed by table name, and for each range ``<table>:<range>``.

    Single-layer tables, and ranges of width d, have none. If rows are cut into chunks, there is one for each chunk of a
    multi-layer table, ``<table>:<chunk>``.
    """
    chunk_width = None if adaptive is None else adaptive.chunk_width
    return nn.ModuleDict(
        {
            name: Projection(
                name,
                width,
                table.embedding_dim,
                _projection_std(table, width if chunk_width is None else table.row_width),
                seed,
                device,
                table.projection_init,
            )
            for table in tables
            for name, width in _projection_widths(table, chunk_width).items()
        }
    )


def _projection_std(table: MultiLayerEmbeddingBagConfig, width: int) -> float:
    """Return the standard deviation of a W2 of ``width`` rows, so that the gain is the same for every width."""
    if table.projection_init_std is None:
        return 1 / math.sqrt(width)
    return table.projection_init_std * math.sqrt(table.row_width / width)


def _projection_widths(table: MultiLayerEmbeddingBagConfig, chunk_width: int | None) -> dict[str, int]:
    if table.row_ranges is None:
        return {} if table.hidden_dim is None else {table.name: table.hidden_dim}
    if chunk_width is not None:
        chunks = range(table.row_width // chunk_width)
        return {} if table.hidden_dim is None else {f"{table.name}:{chunk}": chunk_width for chunk in chunks}
    widths = {f"{table.name}:{index}": each.width for index, each in enumerate(table.row_ranges)}
    return {name: width for name, width in widths.items() if width not in (0, table.embedding_dim)}


def projection_weights(projections: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """Return W2 ``(k, d)`` by table name."""
    return {table: cast(torch.Tensor, projection.weight) for table, projection in projections.items()}


def check_loaded_shapes(
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    state: Mapping[str, Any],
    prefix: str,
    rows_name: str = "embedding_bags",
) -> None:
    """Check the shapes of W1 and W2 in a state dict; names that are missing are skipped.

    Raises:
        ValueError: W1's columns differ from W2's rows, or the shape of either differs from the table's.
    """
    for table in tables:
        rows = state.get(f"{prefix}{rows_name}.{table.name}.weight")
        for segment in segments_of([table]):
            projection = state.get(f"{prefix}projections.{segment.name}.weight")
            if rows is not None and projection is not None:
                check_layers_fit(segment.name, rows.shape, projection.shape)
            expected = {"W1": (table.num_embeddings, table.row_width), "W2": (table.row_width, table.embedding_dim)}
            for layer, name, tensor in (("W1", table.name, rows), ("W2", segment.name, projection)):
                if tensor is not None and tuple(tensor.shape) != expected[layer]:
                    shapes = f"{tuple(tensor.shape)} in the state and {expected[layer]} in the module"
                    raise ValueError(f"table {name!r}: {layer} is {shapes}")


def check_layers_fit(table: str, rows: Sequence[int], projection: Sequence[int]) -> None:
    """Raise ValueError unless W1 of shape ``rows`` has as many columns as W2 of shape ``projection`` has rows."""
    if rows[1] != projection[0]:
        raise ValueError(f"table {table!r}: W1 has {rows[1]} columns and W2 has {projection[0]} rows")


def check_before_load(module: MultiLayerTables, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Check the shapes in a state dict; a hook of ``load_state_dict``."""
    check_loaded_shapes(module.row_tables(), state_dict, prefix, module.rows_name)
