"""Project, then all-to-all: a table's owner pools the bags of all ranks, and d columns leave it, not k."""

import torch
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist, TwPooledEmbeddingSharding

from mlet_dist.embeddings.sharded.projected_sums import ExchangedDims, ProjectedSums


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
