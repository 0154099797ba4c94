"""Rows of distinct ids, table after table, out of fbgemm's kernels with their fused optimizers."""

import dataclasses
from typing import Any

import torch
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class RowLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup returning each id's own row: ids of T tables -> rows ``(U, k)``, unpadded.

    Args:
        grouped_configs: tables of one width k, grouped by TorchRec.
        unpooled: one unpooled kernel a group, fit for CUDA. On the CPU fbgemm's unpooled backward is many times slower
            than its pooled one, so there each table has a pooled kernel of its own, on bags of one id.
        **torchrec_arguments: as of TorchRec's lookup.
    """

    def __init__(
        self, grouped_configs: list[GroupedEmbeddingConfig], *, unpooled: bool, **torchrec_arguments: Any
    ) -> None:
        groups = []
        for group in grouped_configs:
            tables = [_serving_one_feature(table) for table in group.embedding_tables]
            groups += [
                dataclasses.replace(
                    group,
                    embedding_tables=together,
                    pooling=PoolingType.NONE if unpooled else PoolingType.SUM,
                    is_weighted=False,
                )
                for together in ([tables] if unpooled else [[table] for table in tables])
            ]
        super().__init__(groups, **torchrec_arguments)
        self._unpooled = unpooled

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Look up ``sparse_features``: a key a table, of one bag, with the ids of the table."""
        groups = sparse_features.split(self._feature_splits) if self._unpooled else _bags_of_one_id(sparse_features)
        return torch.cat([kernel(ids) for kernel, ids in zip(self._emb_modules, groups, strict=True)])


def _serving_one_feature(table: ShardedEmbeddingTable) -> ShardedEmbeddingTable:
    # Ids are those of the table, whichever of its features they came from.
    return dataclasses.replace(table, feature_names=table.feature_names[:1], embedding_names=table.embedding_names[:1])


def _bags_of_one_id(features: KeyedJaggedTensor) -> list[KeyedJaggedTensor]:
    counts = features.length_per_key()
    offsets = torch.arange(max(counts) + 1, device=features.device())
    return [
        KeyedJaggedTensor([key], ids, offsets=offsets[: count + 1], stride=count)
        for key, ids, count in zip(features.keys(), features.values().split(counts), counts, strict=True)
    ]
