"""The unsharded multi-layer embedding module (MLET, arXiv:2006.05623), a drop-in for TorchRec's EmbeddingBagCollection.

A table W ``(n, d)`` is trained as the product of two layers, W1 ``(n, k)`` and W2 ``(k, d)``, with k >= d as a rule.
Pooling is linear, so W2 is applied to the pooled rows: ``pool(W1[ids]) · W2``. After training ``collapse`` returns the
plain table W = W1·W2 for serving.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.distributed.utils import none_throws
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.collapse import block_rows, collapse_rows
from mlet_dist.embeddings.initializers import LeftUndrawn
from mlet_dist.embeddings.input_check import check_batch, smallest_tables
from mlet_dist.embeddings.projection import Projection, project
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.row_ranges import join_ranges, segments_of, split_by_range, tables_of_rows
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, Segment, as_multi_layer


class MultiLayerEmbeddingBagCollection(EmbeddingBagCollection):
    """An EmbeddingBagCollection whose tables are trained as W = W1·W2, with W1 ``(n, k)`` and W2 ``(k, d)``.

    It maps a KeyedJaggedTensor to a KeyedTensor of d-dimensional vectors, and ``embedding_bag_configs()`` reports d, so
    TorchRec's models accept it unchanged. In the state dict W1 is ``embedding_bags.<table>.weight`` and W2 is
    ``projections.<table>.weight``.

    The rows of W1 are not stored by id, here and in the sharded module, so that all ranks own their share of the
    frequent ids (see ``row_order``). The config's ``row_order`` converts: ``from_stored(weight)`` is W1 by id.

    Args:
        tables: one config per table. TorchRec's own EmbeddingBagConfig is treated as a single-layer table.
        is_weighted: whether the KeyedJaggedTensor carries per-sample weights.
        device: device of the parameters; ``meta`` allocates nothing.
        seed: with table and row it determines the initial values.
        adaptive: if given, rows of the tables with row ranges move between the widths of their table while they train
            (``slot_layout``). Such a collection computes nothing before it is sharded.

    Raises:
        ValueError: two tables have the same name, a name is not a valid key of torch's ModuleDict, or a dimension is
            below 1.

    Example::

        tables = [MultiLayerEmbeddingBagConfig(name="t1", num_embeddings=1000, embedding_dim=16, hidden_dim=64,
                                               feature_names=["f1"])]
        embeddings = MultiLayerEmbeddingBagCollection(tables, device=torch.device("meta"))
        model = DLRM(embeddings, dense_in_features=13, dense_arch_layer_sizes=[64, 16], over_arch_layer_sizes=[64, 1])
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        seed: int = 0,
        adaptive: AdaptiveRows | None = None,
    ) -> None:
        multi_layer = [as_multi_layer(table) for table in tables]
        for table in multi_layer:
            if not table.name or "." in table.name or hasattr(nn.ModuleDict, table.name):
                raise ValueError(f"table {table.name!r}: no module of torch can have this name; choose another")
        self._row_tables = tables_of_rows(multi_layer, seed, adaptive)
        super().__init__([table.rows_config(seed) for table in self._row_tables], is_weighted, device)
        self._tables = multi_layer
        self.seed = seed
        self.adaptive = adaptive if any(table.row_ranges is not None for table in multi_layer) else None
        self.projections = build_projections(self._tables, seed, self.device, self.adaptive)
        for table in self._row_tables:
            if (order := table.row_order) is not None:
                bag = self.embedding_bags[table.name]
                bag.register_forward_pre_hook(partial(_look_up_stored, order), with_kwargs=True)
        self._projection_of_key = projection_of_key(self._row_tables)
        self._smallest_tables = smallest_tables(self._tables)
        self.register_load_state_dict_pre_hook(_check_before_load)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up, pool and project.

        Returns:
            KeyedTensor with values ``(B, sum of d)`` float32.

        Raises:
            ValueError: the batch is invalid (see ``input_check.check_batch``), or it has per-sample weights and a table
                has FP16 rows. The message names the table.
            NotImplementedError: the collection is adaptive.
        """
        self._check_rows_stay("computes nothing")
        features = maybe_td_to_kjt(features, None)
        half = [table.name for table in self._tables if table.data_type == DataType.FP16]
        if half and self.is_weighted():
            raise ValueError(
                f"table {half[0]!r}: torch cannot pool FP16 rows with per-sample weights in an unsharded module; "
                "use FP32"
            )
        if not torch.compiler.is_compiling():
            check_batch(features, self._smallest_tables, self.is_weighted())
        weights = by_key(projection_weights(self.projections), self._projection_of_key)
        if all(table.row_ranges is None for table in self._tables):
            return project(super().forward(features), weights)
        vectors = project(super().forward(split_by_range(features, self._tables, self._row_tables)), weights)
        return join_ranges(vectors, features, self._tables, self._row_tables)

    def reset_parameters(self) -> None:
        """Draw the initial values of both layers again; does nothing on the meta device."""
        super().reset_parameters()
        # TorchRec's constructor calls this before the projections exist; each projection then draws its own values.
        for projection in getattr(self, "projections", {}).values():
            projection.reset_parameters()

    def leave_rows_undrawn(self) -> None:
        """Let ``reset_parameters``, also that of the sharded module, leave the rows of all tables as they are.

        For a module whose rows are all loaded from a checkpoint, since drawing many takes minutes.
        """
        for table in self._embedding_bag_configs:
            table.init_fn = LeftUndrawn()

    def embedding_bag_configs(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables' configs, whose ``embedding_dim`` is d, as the model expects."""
        return list(self._tables)

    def row_tables(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables that store the rows, which the sharding plan and the state dict name.

        They are the tables themselves, but pools for those with row ranges (``row_ranges.tables_of_rows``).
        """
        return list(self._row_tables)

    def _check_rows_stay(self, problem: str) -> None:
        if self.adaptive is not None:
            raise NotImplementedError(
                f"a collection whose rows move between widths {problem} before it is sharded; shard it, or leave "
                "`adaptive` out"
            )

    def rows(self) -> EmbeddingBagCollection:
        """Return the first layer alone: a plain collection of W1 over the same parameters, with sum pooling.

        TorchRec's row-wise mean pooling is wrong where tables of several sharding types share a collection or a
        feature, so the sharded module applies the mean itself.
        """
        tables = [dataclasses.replace(table, pooling=PoolingType.SUM) for table in self._embedding_bag_configs]
        rows = EmbeddingBagCollection(tables, self.is_weighted(), torch.device("meta"))
        rows.embedding_bags = self.embedding_bags
        return rows

    @torch.no_grad()
    def collapse(self) -> EmbeddingBagCollection:
        """Return the plain EmbeddingBagCollection with W = W1·W2 for serving (MLET paper, section 2).

        On the meta device only shapes are computed.

        Raises:
            NotImplementedError: the collection is adaptive.
        """
        tables = [table.plain_config() for table in self._tables]
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            plain = EmbeddingBagCollection(tables, self.is_weighted(), device)
        if device.type != "meta":
            self._check_rows_stay("cannot be collapsed")
            weights = projection_weights(self.projections)
            for bag in plain.embedding_bags.values():
                bag.weight.zero_()  # rows that are not stored
            for stored in self._row_tables:
                for segment in segments_of([stored]):
                    whole = plain.embedding_bags[segment.table].weight
                    stop = segment.first_row + segment.rows
                    self._collapse_segment(stored, segment, weights.get(segment.name), whole[segment.first_row : stop])
                    whole[stop : stop + segment.shared_by] = whole[stop - 1]
        return plain

    def _collapse_segment(
        self,
        stored: MultiLayerEmbeddingBagConfig,
        segment: Segment,
        projection: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Fill ``out`` ``(rows, d)`` with the served rows of a segment of a stored table, by id."""
        weight, order = self.embedding_bags[stored.name].weight, none_throws(stored.row_order)
        step = block_rows(weight.shape[1], out.shape[1])
        for start in range(0, segment.rows, step):
            stop = min(start + step, segment.rows)
            ids = torch.arange(segment.offset + start, segment.offset + stop, device="cpu")
            rows = weight[order.stored_rows(ids).to(weight.device)]
            out[start:stop].copy_(rows if projection is None else collapse_rows(rows, projection))


def _look_up_stored(
    order: RowOrder, bag: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn the rows in the arguments of an EmbeddingBag into stored rows."""
    rows = kwargs["input"]
    return args, kwargs | {"input": order.stored_rows(rows).to(rows.dtype)}


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
    return {table: projection.get_parameter("weight") for table, projection in projections.items()}


def projection_of_key(tables: list[MultiLayerEmbeddingBagConfig]) -> dict[str, str]:
    """Return the name of the W2 of each key of the output KeyedTensor, which is that of its table, if that has one.

    TorchRec names keys ``feature`` or ``feature@table``. A pool has a key and a W2 for each feature of a range.
    """
    found: dict[str, str] = {}
    for table, keys in zip(tables, get_embedding_names_by_table(tables), strict=True):
        names = [segment.name for segment in segments_of([table]) for _ in segment.features]
        found |= dict(zip(keys, names, strict=True))
    return found


def by_key(weights: Mapping[str, torch.Tensor], projection_of_key: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Turn weights by name into weights by key of the output KeyedTensor, for the keys that have one."""
    return {key: weights[name] for key, name in projection_of_key.items() if name in weights}


def check_loaded_shapes(tables: Sequence[MultiLayerEmbeddingBagConfig], state: Mapping[str, Any], prefix: str) -> None:
    """Check the shapes of W1 and W2 in a state dict; names that are missing are skipped.

    Raises:
        ValueError: W1's columns differ from W2's rows, or the shape of either differs from the table's.
    """
    for table in tables:
        rows = state.get(f"{prefix}embedding_bags.{table.name}.weight")
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


def _check_before_load(
    module: MultiLayerEmbeddingBagCollection, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    check_loaded_shapes(module.row_tables(), state_dict, prefix)
