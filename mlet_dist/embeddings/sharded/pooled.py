"""A table's rows on the ranks of one node: project, reduce inside the node, then cross to the others with d columns."""

from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist, TwRwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable

from mlet_dist.embeddings.sharded.projected_sums import ExchangedDims, ProjectedSums
from mlet_dist.embeddings.sharded.reduce_scatter import pad_batches


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
