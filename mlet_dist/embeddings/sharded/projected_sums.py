"""What reduce_scatter and all_to_all share: W2 on sums of bags before they leave a rank, d columns in place of k.

pool(W1[ids])·W2 is linear, so each rank may project its own partial sums ``(R·b, k)``, and only d columns are sent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.types import Awaitable

from mlet_dist.embeddings.projection import project_columns
from mlet_dist.embeddings.sharded.exchange_choice import ExchangedShardingInfo, ProjectsBefore


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
