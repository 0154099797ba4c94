"""Exchanges of pooled vectors: W2 is applied to partial sums before TorchRec's reduce-scatter or all-to-all."""

from collections.abc import Callable, Sequence
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

from mlet_dist.embeddings.projection import project_columns
from mlet_dist.embeddings.sharded.exchange_choice import Exchange

ProjectionsOf = Callable[[Sequence[str]], dict[str, torch.Tensor]]
"""Tables -> W2 of those that have one, for this forward pass."""


class ProjectsBefore:
    """A TorchRec output dist that applies W2 itself; the sharded module says where W2 is."""

    projections_of: ProjectionsOf


@dataclass
class ExchangedShardingInfo(EmbeddingShardingInfo):
    """TorchRec's sharding info of one table, with its exchange and what that needs to know.

    Attributes:
        exchange: any but after.
        exchanged_dim: the width d that is sent.
        expected_rows: distinct rows that a batch asks of one rank, for unique_rows.
    """

    exchange: Exchange = "after"
    exchanged_dim: int = 0
    expected_rows: float = 0.0


class ExchangedDims:
    """Mixed into a TorchRec sharding of k-dimensional rows, which then hands on d-dimensional vectors."""

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        self._exchanged_dims = {info.embedding_config.name: info.exchanged_dim for info in sharding_infos}
        super().__init__(sharding_infos, *args, **kwargs)  # type: ignore[call-arg]

    def embedding_dims(self) -> list[int]:
        return [dim for dims in self._dims_by_holder() for dim in dims]

    def uncombined_embedding_dims(self) -> list[int]:
        return self.embedding_dims()

    def _holders(self) -> list[list[GroupedEmbeddingConfig]]:
        """Kernels of each rank or node that holds tables of its own; of all together where none does."""
        raise NotImplementedError

    def _dims_by_holder(self) -> list[list[int]]:
        return [[self._exchanged_dims[table] for table in tables_by_feature(groups)] for groups in self._holders()]

    def _projection_arguments(self, own: Sequence[GroupedEmbeddingConfig]) -> dict[str, Any]:
        """Of a ``ProjectedSums`` that gets what this rank's kernels ``own`` look up."""
        return {
            "tables": tables_by_feature(own),
            "widths": [width for group in own for width in group.embedding_dims()],
            "all_tables": list(self._exchanged_dims),
        }


class ProjectedSums(ProjectsBefore):
    """Mixed into a TorchRec dist of sums ``(R·b, sum of k)``, which then gets them as ``(R·b, sum of d)``.

    Args:
        tables: the table of each feature that this rank looks up.
        widths: k of each.
        all_tables: those of all ranks.
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
    """The table of each feature, in the order in which a lookup of ``groups`` concatenates their vectors."""
    return [table.name for group in groups for table in group.embedding_tables for _ in table.feature_names]


class PaddedRowWiseSharding(RwPooledEmbeddingSharding):
    """TorchRec's row-wise sharding, for ranks whose batches are of different sizes, too."""

    def create_output_dist(self, device: torch.device | None = None) -> "PaddedReduceScatter":
        return PaddedReduceScatter(
            self._pg, qcomm_codecs_registry=self.qcomm_codecs_registry, embedding_dims=self.embedding_dims()
        )


class PaddedReduceScatter(RwPooledEmbeddingDist):
    """TorchRec's reduce-scatter; where ranks have batches of different sizes, padded to the largest.

    gloo needs it.
    """

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Partial sums ``(sum of b, width)`` -> this rank's vectors ``(b, width)``."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if sharding_ctx is None or sharding_ctx.variable_batch_per_feature or len(set(sizes)) == 1:
            return super().forward(local_embs, sharding_ctx)
        own = sizes[dist.get_rank(self._pg)]
        equal = EmbeddingShardingContext(batch_size_per_rank=[max(sizes)] * len(sizes))
        pooled = super().forward(pad_batches(local_embs, sizes), equal)
        pooled.callbacks.append(lambda vectors: vectors[:own])
        return pooled


def pad_batches(vectors: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Batches of ``sizes`` rows, one after another, as batches of the largest size: ``(R·b, width)``."""
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

    def _holders(self) -> list[list[GroupedEmbeddingConfig]]:
        return [self._grouped_embedding_configs]


class ProjectedReduceScatter(ProjectedSums, PaddedReduceScatter):
    """Partial sums ``(R·b, sum of k)`` -> vectors ``(b, sum of d)`` of this rank's batch."""


class PaddedTableRowWiseSharding(TwRwPooledEmbeddingSharding):
    """TorchRec's table-row-wise sharding, for ranks whose batches are of different sizes, too."""

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
    """TorchRec's reduce-scatter and all-to-all; where ranks have batches of different sizes, padded to the largest.

    gloo needs it.
    """

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Partial sums ``(sum of b, width)`` of a node's tables -> vectors ``(b, widths of all nodes)``."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if sharding_ctx is None or sharding_ctx.variable_batch_per_feature or len(set(sizes)) == 1:
            return super().forward(local_embs, sharding_ctx)
        local_size, nodes = dist.get_world_size(self._intra_pg), dist.get_world_size(self._cross_pg)
        # Bags come by local rank, then by node.
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

    def _holders(self) -> list[list[GroupedEmbeddingConfig]]:
        return self._grouped_embedding_configs_per_node

    def _dim_sum_per_node(self) -> list[int]:
        return [sum(dims) for dims in self._dims_by_holder()]

    def _emb_dim_per_node_per_feature(self) -> list[list[int]]:
        return self._dims_by_holder()


class ProjectedNodeReduce(ProjectedSums, PaddedNodeReduce):
    """Partial sums ``(R·b, sum of this node's k)`` -> vectors ``(b, sum of all d)`` of this rank's batch."""


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

    def _holders(self) -> list[list[GroupedEmbeddingConfig]]:
        return self._grouped_embedding_configs_per_rank

    def _dim_sum_per_rank(self) -> list[int]:
        return [sum(dims) for dims in self._dims_by_holder()]

    def _emb_dim_per_rank_per_feature(self) -> list[list[int]]:
        return self._dims_by_holder()


class ProjectedAllToAll(ProjectedSums, TwPooledEmbeddingDist):
    """Sums of all ranks' bags ``(R·b, sum of this rank's k)`` -> vectors ``(b, sum of all d)`` of this rank's batch."""
