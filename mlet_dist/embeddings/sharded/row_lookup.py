"""Lookup of distinct ids, one row per id without pooling, by fbgemm's kernels with fused optimizers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.embeddings.sharded.table_pool import TablePool

PADDED_BYTES = 1 << 18
"""On a CPU, a table without a fused optimizer and at most this many bytes of rows per batch shares a padded kernel with
others. A measured value, about the size of a core's cache; above it a kernel of its own is cheaper than padding."""


def group_for_rows(
    groups: list[GroupedEmbeddingConfig],
    expected_rows: Mapping[str, float],
    dims: Mapping[str, int],
    *,
    unpooled: bool,
) -> list[GroupedEmbeddingConfig]:
    """Regroup tables into the kernels of RowLookup, in the order of their d.

    On CUDA one unpooled kernel serves all tables of a group with the same k and d. On the CPU fbgemm's unpooled
    backward is many times slower than the pooled one. There, one pooled kernel with a fused optimizer serves all
    tables (``table_pool``). A kernel without one pads the rows of its tables to the longest: tables with few expected
    rows share such a kernel, and each other table has its own.

    Args:
        groups: TorchRec's groups.
        expected_rows: by table, the expected number of distinct rows that a global batch requests from this rank.
        dims: d of each table.
        unpooled: whether to use unpooled kernels, as on CUDA.
    """
    kernels = []
    for group in groups:
        # TorchRec may put tables of several widths in a group.
        for shape in dict.fromkeys((dims[table.name], table.local_cols) for table in group.embedding_tables):
            tables = [
                _serving_one_feature(table)
                for table in group.embedding_tables
                if (dims[table.name], table.local_cols) == shape
            ]
            row_bytes = shape[1] * 4
            together = unpooled or group.compute_kernel == EmbeddingComputeKernel.FUSED
            small = [table for table in tables if together or expected_rows[table.name] * row_bytes <= PADDED_BYTES]
            for of_kernel in ([small] if small else []) + [[table] for table in tables if table not in small]:
                kernel = dataclasses.replace(
                    group,
                    embedding_tables=of_kernel,
                    pooling=PoolingType.NONE if unpooled else PoolingType.SUM,
                    is_weighted=False,
                )
                kernels.append((shape[0], kernel))
    return [kernel for _, kernel in sorted(kernels, key=lambda each: each[0])]


class RowLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup without pooling: U ids of T tables -> their rows, table by table, flat ``(sum of U_t·k_t,)``.

    Args:
        grouped_configs: the groups that ``group_for_rows`` returns.
        **torchrec_arguments: arguments of TorchRec's lookup.
    """

    def __init__(self, grouped_configs: list[GroupedEmbeddingConfig], **torchrec_arguments: Any) -> None:
        super().__init__(grouped_configs, **torchrec_arguments)
        self._unpooled = grouped_configs[0].pooling == PoolingType.NONE
        self._pools = [
            TablePool(kernel.emb_module)
            if len(config.embedding_tables) > 1 and not self._unpooled and isinstance(kernel, BatchedFusedEmbeddingBag)
            else None
            for kernel, config in zip(self._emb_modules, grouped_configs, strict=True)
        ]

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Look up ``sparse_features``, which has one key per table in the order of the kernels, each with one bag."""
        parts = zip(self._emb_modules, self._pools, sparse_features.split(self._feature_splits), strict=True)
        rows = [
            (_look_up(kernel, ids, self._unpooled) if pool is None else pool(ids)).view(-1)
            for kernel, pool, ids in parts
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _serving_one_feature(table: ShardedEmbeddingTable) -> ShardedEmbeddingTable:
    # The ids are merged over the table's features, so one feature stands for all of them.
    return dataclasses.replace(table, feature_names=[table.name], embedding_names=[table.name])


def _look_up(kernel: torch.nn.Module, ids: KeyedJaggedTensor, unpooled: bool) -> torch.Tensor:
    # Bags have one id each, even in an unpooled kernel, because fbgemm's CUDA kernels distribute work by bags.
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
    return _pooled_rows(kernel(bags), filled)


def _pooled_rows(padded: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Return the rows ``(U, k)`` of a pooled kernel on a CPU, whose bags ``filled`` ``(T, slots)`` have an id."""
    tables, slots = filled.shape
    by_table = padded.view(slots, tables, padded.shape[1] // tables)
    return by_table.transpose(0, 1).flatten(0, 1).index_select(0, filled.view(-1).nonzero().squeeze(1))
