"""Project, then reduce-scatter: partial sums of bags leave a rank with d columns, not k."""

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable

from mlet_dist.embeddings.sharded.projected_sums import ExchangedDims, ProjectedSums


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
