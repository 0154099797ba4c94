"""Project, then reduce-scatter: partial sums of bags leave a rank with d columns, not k."""

from typing import Any

import torch
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedTensor

from mlet_dist.embeddings.exchange import ProjectedRowWiseSharding, ProjectionsOf
from mlet_dist.embeddings.projection import project


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


class ProjectedReduceScatter(RwPooledEmbeddingDist):
    """Partial sums ``(R·b, sum of k)`` -> vectors ``(b, sum of d)`` of this rank's batch."""

    def __init__(self, *args: Any, tables: list[str], widths: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables, self._widths = tables, widths
        self.projections_of: ProjectionsOf

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project, then reduce-scatter.

        Raises:
            ValueError: the batch size varies by feature, for which the lookup's layout is another.
        """
        if sharding_ctx is not None and sharding_ctx.variable_batch_per_feature:
            raise ValueError(f"table {self._tables[0]!r}: a batch size that varies by feature needs exchange 'after'")
        weights = self.projections_of(self._tables)
        # Positions stand for features here: one table may serve several.
        keys = [str(index) for index in range(len(self._tables))]
        partial = KeyedTensor(keys=keys, length_per_key=self._widths, values=local_embs, key_dim=1)
        by_key = {key: weights[table] for key, table in zip(keys, self._tables, strict=True) if table in weights}
        return super().forward(project(partial, by_key).values(), sharding_ctx)
