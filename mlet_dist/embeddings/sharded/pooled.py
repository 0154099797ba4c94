"""Exchanges of pooled vectors, and mean pooling.

TorchRec's row_wise, table_row_wise and table_wise shardings are extended in two respects:

- ``Padded*``: ranks may have batches of different sizes. They are padded to the largest for the reduce-scatter, because
  gloo requires equal sizes.
- ``Projected*``: W2 is applied to the (partial) sums before TorchRec's reduce-scatter or all-to-all, so d instead of k
  columns are exchanged.

All exchanges sum. Mean pooling is applied to the result by ``normalize_by_bag_size``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist, TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist, TwRwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.embeddings.projection import project_columns
from mlet_dist.embeddings.sharded.exchange_choice import Exchange
from mlet_dist.embeddings.sharded.slot_map import SlotMap
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, Segment

ProjectionsOf = Callable[[Sequence[str]], dict[str, torch.Tensor]]
"""Maps tables to the W2 of those that have one, as used in this forward pass."""


class ProjectingDist:
    """Base of TorchRec output dists that apply W2; the sharded module sets ``projections_of``."""

    projections_of: ProjectionsOf


@dataclass(frozen=True)
class ServedFeature:
    """A feature of the model, the key of its vectors, and the table that the model sees, of ``num_embeddings`` rows."""

    feature: str
    key: str
    table: str
    num_embeddings: int


@dataclass
class ExchangedShardingInfo(EmbeddingShardingInfo):
    """TorchRec's sharding info of one table, plus its exchange.

    Attributes:
        exchange: any exchange but ``after``.
        exchanged_dim: d, the width of the exchanged vectors.
        expected_rows: for unique_rows, the expected number of distinct rows that a global batch requests from one rank.
        segments: the tables' rows that are stored; one segment, but for a pool.
        served: the features that TorchRec regards as those of the table: its own. Those of a table with row ranges
            belong to the pool that has the first of its ranges.
        slots: for pools of adaptive tables, the slots of this rank's rows.
    """

    exchange: Exchange = "after"
    exchanged_dim: int = 0
    expected_rows: float = 0.0
    segments: tuple[Segment, ...] = ()
    served: tuple[ServedFeature, ...] = ()
    slots: SlotMap | None = None


class ExchangedDims:
    """Mixin for a TorchRec sharding of k-dimensional rows that outputs d-dimensional vectors."""

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        self._exchanged_dims = {info.embedding_config.name: info.exchanged_dim for info in sharding_infos}
        super().__init__(sharding_infos, *args, **kwargs)  # type: ignore[call-arg]

    def embedding_dims(self) -> list[int]:
        return [dim for dims in self._dims_by_owner() for dim in dims]

    def uncombined_embedding_dims(self) -> list[int]:
        return self.embedding_dims()

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        """Return the kernels by owner: by rank or node if tables belong to one, else a single list of all kernels."""
        raise NotImplementedError

    def _dims_by_owner(self) -> list[list[int]]:
        return [[self._exchanged_dims[table] for table in tables_by_feature(groups)] for groups in self._owners()]

    def _projection_arguments(self, own: Sequence[GroupedEmbeddingConfig]) -> dict[str, Any]:
        """Return the arguments of ``ProjectedSums`` for the output of this rank's kernels ``own``."""
        return {
            "tables": tables_by_feature(own),
            "widths": [width for group in own for width in group.embedding_dims()],
            "all_tables": list(self._exchanged_dims),
        }


class ProjectedSums(ProjectingDist):
    """Mixin for a TorchRec output dist of sums: projects ``(R·b, sum of k)`` to ``(R·b, sum of d)`` first.

    Args:
        tables: the table of each feature that this rank looks up.
        widths: k of each of these features.
        all_tables: the tables of all ranks.
    """

    def __init__(self, *args: Any, tables: list[str], widths: list[int], all_tables: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables, self._widths, self._all_tables = tables, widths, all_tables

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project, then exchange."""
        weights = self.projections_of(self._all_tables)
        projected = project_columns(local_embs, self._tables, self._widths, weights)
        vectors: Awaitable[torch.Tensor] = super().forward(projected, sharding_ctx)  # type: ignore[misc]
        return vectors


def tables_by_feature(groups: Sequence[GroupedEmbeddingConfig]) -> list[str]:
    """Return the table of each feature, in the order in which a lookup of ``groups`` concatenates their vectors."""
    return [table.name for group in groups for table in group.embedding_tables for _ in table.feature_names]


class PaddedRowWiseSharding(RwPooledEmbeddingSharding):
    """TorchRec's row-wise sharding; ranks may have batches of different sizes."""

    def create_output_dist(self, device: torch.device | None = None) -> "PaddedReduceScatter":
        return PaddedReduceScatter(
            self._pg, qcomm_codecs_registry=self.qcomm_codecs_registry, embedding_dims=self.embedding_dims()
        )


class PaddedReduceScatter(RwPooledEmbeddingDist):
    """TorchRec's reduce-scatter; batches of different sizes are padded to the largest, as gloo requires."""

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Reduce partial sums ``(sum of b, width)`` to this rank's vectors ``(b, width)``."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if sharding_ctx is None or sharding_ctx.variable_batch_per_feature or len(set(sizes)) == 1:
            return super().forward(local_embs, sharding_ctx)
        own = sizes[dist.get_rank(self._pg)]
        equal = EmbeddingShardingContext(batch_size_per_rank=[max(sizes)] * len(sizes))
        pooled = super().forward(pad_batches(local_embs, sizes), equal)
        pooled.callbacks.append(lambda vectors: vectors[:own])
        return pooled


def pad_batches(vectors: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Pad concatenated batches of ``sizes`` rows to the largest, b: ``(sum of sizes, width)`` -> ``(R·b, width)``."""
    parts = vectors.split(sizes)
    return torch.cat([functional.pad(part, (0, 0, 0, max(sizes) - part.shape[0])) for part in parts])


class ReduceScatterSharding(ExchangedDims, PaddedRowWiseSharding):
    """TorchRec's row-wise sharding with W2 between the lookup and the reduce-scatter."""

    def create_output_dist(self, device: torch.device | None = None) -> "ProjectedReduceScatter":
        return ProjectedReduceScatter(
            self._pg,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            embedding_dims=self.embedding_dims(),
            **self._projection_arguments(self._grouped_embedding_configs),
        )

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        return [self._grouped_embedding_configs]


class ProjectedReduceScatter(ProjectedSums, PaddedReduceScatter):
    """Reduce-scatter from partial sums ``(R·b, sum of k)`` to this rank's vectors ``(b, sum of d)``."""


class PaddedTableRowWiseSharding(TwRwPooledEmbeddingSharding):
    """TorchRec's table-row-wise sharding; ranks may have batches of different sizes."""

    def create_output_dist(self, device: torch.device | None = None) -> "PaddedNodeReduce":
        return PaddedNodeReduce(**self._dist_arguments(device))

    def _dist_arguments(self, device: torch.device | None) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "cross_pg": self._cross_pg,
            "intra_pg": self._intra_pg,
            "dim_sum_per_node": self._dim_sum_per_node(),
            "emb_dim_per_node_per_feature": self._emb_dim_per_node_per_feature(),
            "device": device or self._device,
            "qcomm_codecs_registry": self.qcomm_codecs_registry,
        }


class PaddedNodeReduce(TwRwPooledEmbeddingDist):
    """TorchRec's reduce-scatter in a node and all-to-all between nodes; pads batches of different sizes for gloo."""

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Reduce partial sums ``(sum of b, width)`` of a node's tables to vectors ``(b, sum of all nodes' widths)``."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if sharding_ctx is None or sharding_ctx.variable_batch_per_feature or len(set(sizes)) == 1:
            return super().forward(local_embs, sharding_ctx)
        local_size, nodes = dist.get_world_size(self._intra_pg), dist.get_world_size(self._cross_pg)
        # Bags are ordered by local rank, then by node.
        staggered = [sizes[local + node * local_size] for local in range(local_size) for node in range(nodes)]
        equal = EmbeddingShardingContext(batch_size_per_rank=[max(sizes)] * len(sizes))
        pooled = super().forward(pad_batches(local_embs, staggered), equal)
        pooled.callbacks.append(lambda vectors: vectors[: sizes[self._rank]])
        return pooled


class NodeReduceSharding(ExchangedDims, PaddedTableRowWiseSharding):
    """TorchRec's table-row-wise sharding with W2 between the lookup and the node's reduce-scatter."""

    def create_output_dist(self, device: torch.device | None = None) -> "ProjectedNodeReduce":
        own = self._grouped_embedding_configs_per_rank[self._rank]
        return ProjectedNodeReduce(**self._dist_arguments(device), **self._projection_arguments(own))

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        return self._grouped_embedding_configs_per_node

    def _dim_sum_per_node(self) -> list[int]:
        return [sum(dims) for dims in self._dims_by_owner()]

    def _emb_dim_per_node_per_feature(self) -> list[list[int]]:
        return self._dims_by_owner()


class ProjectedNodeReduce(ProjectedSums, PaddedNodeReduce):
    """Exchange from partial sums ``(R·b, sum of this node's k)`` to this rank's vectors ``(b, sum of all d)``."""


class AllToAllSharding(ExchangedDims, TwPooledEmbeddingSharding):
    """TorchRec's table-wise sharding with W2 between the lookup and the all-to-all."""

    def create_output_dist(self, device: torch.device | None = None) -> "ProjectedAllToAll":
        return ProjectedAllToAll(
            self._pg,
            self._dim_sum_per_rank(),
            self._emb_dim_per_rank_per_feature(),
            device or self._device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            **self._projection_arguments(self._grouped_embedding_configs),
        )

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        return self._grouped_embedding_configs_per_rank

    def _dim_sum_per_rank(self) -> list[int]:
        return [sum(dims) for dims in self._dims_by_owner()]

    def _emb_dim_per_rank_per_feature(self) -> list[list[int]]:
        return self._dims_by_owner()


class ProjectedAllToAll(ProjectedSums, TwPooledEmbeddingDist):
    """All-to-all from sums ``(R·b, sum of this rank's k)`` to this rank's vectors ``(b, sum of all d)``."""


def mean_keys(tables: list[MultiLayerEmbeddingBagConfig]) -> dict[str, str]:
    """Return the feature of each key of the output KeyedTensor that has mean pooling."""
    return {
        key: feature
        for table, keys in zip(tables, get_embedding_names_by_table(tables), strict=True)
        if table.pooling == PoolingType.MEAN
        for key, feature in zip(keys, table.feature_names, strict=True)
    }


@torch.no_grad()
def bag_sizes(features: KeyedJaggedTensor, keys: Mapping[str, str]) -> torch.Tensor:
    """Return the divisors of mean pooling, ``(len(keys), B)`` float32: the bag sizes, and 1 for an empty bag.

    As in TorchRec's row-wise sharding, the divisor of a bag with per-sample weights is their sum.
    """
    weights = features.weights_or_none()
    if weights is None:
        sizes = features.lengths().float()
    else:
        sizes = torch.ops.fbgemm.segment_sum_csr(1, features.offsets().int(), weights).float()
    of_feature = dict(zip(features.keys(), sizes.split(features.stride_per_key()), strict=True))
    if features.variable_stride_per_key():
        names, inverse = features.inverse_indices()
        of_feature = {name: of_feature[name][row] for name, row in zip(names, inverse, strict=True)}
    found = torch.stack([of_feature[feature] for feature in keys.values()])
    return torch.where(found == 0, torch.ones_like(found), found)


def normalize_by_bag_size(pooled: KeyedTensor, keys: Mapping[str, str], sizes: torch.Tensor) -> KeyedTensor:
    """Divide the vectors of ``keys`` by ``sizes`` ``(len(keys), B)``; vectors of other keys are unchanged."""
    names, widths = pooled.keys(), pooled.length_per_key()
    row = {key: index for index, key in enumerate(keys)}
    parts = [
        part / sizes[row[name]].unsqueeze(1).to(part.dtype) if name in row else part
        for name, part in zip(names, pooled.values().split(widths, dim=1), strict=True)
    ]
    return KeyedTensor(keys=names, length_per_key=widths, values=torch.cat(parts, dim=1), key_dim=1)
