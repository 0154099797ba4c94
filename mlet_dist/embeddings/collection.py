"""The unsharded multi-layer embedding module (MLET, arXiv:2006.05623), a drop-in for TorchRec's EmbeddingBagCollection.

A table W ``(n, d)`` is trained as the product of two layers, W1 ``(n, k)`` and W2 ``(k, d)``, with k >= d as a rule.
Pooling is linear, so W2 is applied to the pooled rows: ``pool(W1[ids]) · W2``. After training ``collapse`` returns the
plain table W = W1·W2 for serving.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.input_check import check_batch, smallest_tables
from mlet_dist.embeddings.multi_layer_tables import (
    MultiLayerTables,
    build_projections,
    check_before_load,
    check_names,
    projection_weights,
)
from mlet_dist.embeddings.projection import project
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.row_ranges import join_ranges, segments_of, split_by_range, tables_of_rows
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, as_multi_layer


class MultiLayerEmbeddingBagCollection(MultiLayerTables, EmbeddingBagCollection):
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
        ValueError: two tables have the same name, a name is not a valid key of torch's ModuleDict, a dimension is below
            1, or a table is not pooled.

    Example::

        tables = [MultiLayerEmbeddingBagConfig(name="t1", num_embeddings=1000, embedding_dim=16, hidden_dim=64,
                                               feature_names=["f1"])]
        embeddings = MultiLayerEmbeddingBagCollection(tables, device=torch.device("meta"))
        model = DLRM(embeddings, dense_in_features=13, dense_arch_layer_sizes=[64, 16], over_arch_layer_sizes=[64, 1])
    """

    rows_name = "embedding_bags"
    embedding_bags: nn.ModuleDict
    _embedding_bag_configs: list[EmbeddingBagConfig]

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        seed: int = 0,
        adaptive: AdaptiveRows | None = None,
    ) -> None:
        multi_layer = [as_multi_layer(table) for table in tables]
        check_names(multi_layer)
        for table in multi_layer:
            if table.pooling == PoolingType.NONE:
                raise ValueError(f"table {table.name!r}: is not pooled; put it into a MultiLayerEmbeddingCollection")
        self._row_tables = tables_of_rows(multi_layer, seed, adaptive)
        super().__init__([table.rows_config(seed) for table in self._row_tables], is_weighted, device)
        self._tables = multi_layer
        self._rows_configs = self._embedding_bag_configs
        self.seed = seed
        self.adaptive = adaptive if any(table.row_ranges is not None for table in multi_layer) else None
        self.projections = build_projections(self._tables, seed, device, self.adaptive)
        for table in self._row_tables:
            if (order := table.row_order) is not None:
                bag = self.embedding_bags[table.name]
                bag.register_forward_pre_hook(partial(_look_up_stored, order), with_kwargs=True)
        self._projection_of_key = projection_of_key(self._row_tables)
        self._smallest_tables = smallest_tables(self._tables)
        self.register_load_state_dict_pre_hook(check_before_load)

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
        if half and self._is_weighted:
            raise ValueError(
                f"table {half[0]!r}: torch cannot pool FP16 rows with per-sample weights in an unsharded module; "
                "use FP32"
            )
        if not torch.compiler.is_compiling():
            check_batch(features, self._smallest_tables, self._is_weighted)
        weights = by_key(projection_weights(self.projections), self._projection_of_key)
        if all(table.row_ranges is None for table in self._tables):
            return project(super().forward(features), weights)
        vectors = project(super().forward(split_by_range(features, self._tables, self._row_tables)), weights)
        return join_ranges(vectors, features, self._tables, self._row_tables)

    def reset_parameters(self) -> None:
        """Draw the initial values of both layers again; does nothing on the meta device."""
        EmbeddingBagCollection.reset_parameters(self)
        # TorchRec's constructor calls this before the projections exist; each projection then draws its own values.
        for projection in getattr(self, "projections", {}).values():
            projection.reset_parameters()

    def embedding_bag_configs(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables' configs, whose ``embedding_dim`` is d, as the model expects."""
        return self.table_configs()

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
            plain = EmbeddingBagCollection(tables, self._is_weighted, device)
        if device.type != "meta":
            self._fill_collapsed({name: bag.weight for name, bag in plain.embedding_bags.items()})
        return plain


def _look_up_stored(
    order: RowOrder, bag: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn the rows in the arguments of an EmbeddingBag into stored rows."""
    rows = kwargs["input"]
    return args, kwargs | {"input": order.stored_rows(rows).to(rows.dtype)}


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
