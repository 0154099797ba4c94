"""Rows of distinct ids, table after table, out of fbgemm's kernels with their fused optimizers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# Below this, rows of a table and batch are cheaper to pad than to give a kernel: measured, about what a core caches.
PADDED_BYTES = 1 << 18


def group_for_rows(
    groups: list[GroupedEmbeddingConfig], expected_rows: Mapping[str, float], *, unpooled: bool
) -> list[GroupedEmbeddingConfig]:
    """Which tables share a kernel of RowLookup.

    On CUDA an unpooled kernel takes all tables of a group. On the CPU fbgemm's unpooled backward is many times slower
    than the pooled one, whose output is padded to the longest table. So tables of few expected rows share a pooled
    kernel there, and each of the others has its own.

    Args:
        groups: TorchRec's.
        expected_rows: distinct rows that a batch asks of this rank, by table.
        unpooled: use the kernel that is fit for CUDA.
    """
    kernels = []
    for group in groups:
        tables = [_serving_one_feature(table) for table in group.embedding_tables]
        small = [
            table for table in tables if unpooled or expected_rows[table.name] * table.local_cols * 4 <= PADDED_BYTES
        ]
        for together in ([small] if small else []) + [[table] for table in tables if table not in small]:
            kernels.append(
                dataclasses.replace(
                    group,
                    embedding_tables=together,
                    pooling=PoolingType.NONE if unpooled else PoolingType.SUM,
                    is_weighted=False,
                )
            )
    return kernels


class RowLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup returning each id's own row: ids of T tables -> rows ``(U, k)``, unpadded.

    Args:
        grouped_configs: as ``group_for_rows`` makes them.
        **torchrec_arguments: as of TorchRec's lookup.
    """

    def __init__(self, grouped_configs: list[GroupedEmbeddingConfig], **torchrec_arguments: Any) -> None:
        super().__init__(grouped_configs, **torchrec_arguments)
        self._unpooled = grouped_configs[0].pooling == PoolingType.NONE

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Look up ``sparse_features``: a key a table in the order of the kernels, each of one bag."""
        parts = zip(self._emb_modules, sparse_features.split(self._feature_splits), strict=True)
        rows = [_look_up(kernel, ids, self._unpooled) for kernel, ids in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _serving_one_feature(table: ShardedEmbeddingTable) -> ShardedEmbeddingTable:
    # Ids are those of the table, whichever of its features they came from.
    return dataclasses.replace(table, feature_names=table.feature_names[:1], embedding_names=table.embedding_names[:1])


def _look_up(kernel: torch.nn.Module, ids: KeyedJaggedTensor, unpooled: bool) -> torch.Tensor:
    # Bags of one id, also where nothing is pooled: fbgemm's CUDA kernels share out work by bags.
    counts, keys, device = ids.length_per_key(), ids.keys(), ids.device()
    slots = max(counts)
    if len(keys) == 1:
        offsets = torch.arange(slots + 1, device=device)
        rows: torch.Tensor = kernel(KeyedJaggedTensor(keys, ids.values(), offsets=offsets, stride=slots))
        return rows
    filled = torch.arange(slots, device=device) < ids.lengths().unsqueeze(1)
    bags = KeyedJaggedTensor(keys, ids.values(), lengths=filled.view(-1).long(), stride=slots)
    if unpooled:
        rows = kernel(bags)
        return rows
    padded = kernel(bags)
    by_table = padded.view(slots, len(keys), padded.shape[1] // len(keys))
    return by_table.transpose(0, 1).flatten(0, 1).index_select(0, filled.view(-1).nonzero().squeeze(1))
