"""Project, then reduce-scatter: partial sums of bags leave a rank with d columns, not k."""

from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedTensor

from mlet_dist.embeddings.exchange import ProjectedRowWiseSharding, ProjectionsOf
from mlet_dist.embeddings.projection import project


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
        largest, own = max(sizes), sizes[dist.get_rank(self._pg)]
        padded = [functional.pad(part, (0, 0, 0, largest - part.shape[0])) for part in local_embs.split(sizes)]
        equal = EmbeddingShardingContext(batch_size_per_rank=[largest] * len(sizes))
        pooled = super().forward(torch.cat(padded), equal)
        pooled.callbacks.append(lambda vectors: vectors[:own])
        return pooled


class ReduceScatterSharding(ProjectedRowWiseSharding):
    """TorchRec's row-wise sharding with W2 between the lookup and the reduce-scatter.

    pool(W1[ids])·W2 is linear, so each rank projects its own partial sums ``(R·b, k)`` and only d columns are reduced.
    """

    def create_output_dist(self, device: torch.device | None = None) -> "ProjectedReduceScatter":
        return ProjectedReduceScatter(
            self._pg,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            embedding_dims=self.embedding_dims(),
            tables=self.table_of_feature(),
            widths=self.width_of_feature(),
        )


class ProjectedReduceScatter(PaddedReduceScatter):
    """Partial sums ``(R·b, sum of k)`` -> vectors ``(b, sum of d)`` of this rank's batch."""

    def __init__(self, *args: Any, tables: list[str], widths: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables, self._widths = tables, widths
        self.projections_of: ProjectionsOf

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project, then reduce-scatter."""
        weights = self.projections_of(self._tables)
        # Positions stand for features here: one table may serve several.
        keys = [str(index) for index in range(len(self._tables))]
        partial = KeyedTensor(keys=keys, length_per_key=self._widths, values=local_embs, key_dim=1)
        by_key = {key: weights[table] for key, table in zip(keys, self._tables, strict=True) if table in weights}
        return super().forward(project(partial, by_key).values(), sharding_ctx)
