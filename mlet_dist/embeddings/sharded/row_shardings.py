"""The shardings whose vectors travel as distinct rows (``unique_rows``): of bags, and of sequences."""

from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.embedding_types import (
    BaseGroupedFeatureProcessor,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.types import QuantizedCommCodecs, ShardingEnv, ShardingType
from torchrec.distributed.utils import none_throws

from mlet_dist.embeddings.sharded.batch_agreement import BatchChecker
from mlet_dist.embeddings.sharded.collectives import codecs_of
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.flat_rows import FlatRows
from mlet_dist.embeddings.sharded.placement import ranks_of_blocks
from mlet_dist.embeddings.sharded.pooled import ExchangedDims, ExchangedShardingInfo
from mlet_dist.embeddings.sharded.row_index import RangeIndex, RowIndex, SlotIndex
from mlet_dist.embeddings.sharded.row_lookup import RowLookup, group_for_rows
from mlet_dist.embeddings.sharded.unique_rows import SequenceOutputDist, UniqueRowsInputDist, UniqueRowsOutputDist


class DistinctRowsSharding(ExchangedDims):
    """Mixin for a TorchRec sharding that looks up the distinct rows of a batch.

    Attributes:
        checker: checks the batches; the module sets it.
    """

    checker: BatchChecker
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None
    _output_dist: type[UniqueRowsOutputDist]
    _device: torch.device
    _env: ShardingEnv
    _grouped_embedding_configs: list[GroupedEmbeddingConfig]
    _owners_group: dist.ProcessGroup | None = None  # the ranks that own rows; None if each owns all of them

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        # Features with vectors of the same width are then next to each other, and are pooled together.
        sharding_infos = sorted(sharding_infos, key=lambda info: info.exchanged_dim)
        super().__init__(sharding_infos, *args, **kwargs)
        expected = {info.embedding_config.name: info.expected_rows for info in sharding_infos}
        self._segments = {info.embedding_config.name: info.segments for info in sharding_infos}
        self._served = {info.embedding_config.name: info.served for info in sharding_infos}
        self._slots = sharding_infos[0].slots
        on_cuda = self._device.type == "cuda"
        self._kernels = group_for_rows(
            self._grouped_embedding_configs, expected, self._exchanged_dims, unpooled=on_cuda
        )
        self._flat_rows = FlatRows(sorted(set(self._exchanged_dims.values())), self._device)

    def create_input_dist(self, device: torch.device | None = None) -> UniqueRowsInputDist:
        tables = self._tables()
        served = [
            each
            for group in self._grouped_embedding_configs
            for table in group.embedding_tables
            for each in self._served[table.name]
        ]
        device = device or self._device
        names = [table.name for table in tables]
        index: RowIndex
        if self._slots is not None:
            widths = [pool.width for pool in self._slots.layout.pools]
            pools = {table.name: widths.index(table.local_cols) for table in tables}
            assert self._owners_group is not None
            index = SlotIndex(self._owners_group, pools, self._slots, served, device)
        else:
            index = RangeIndex(
                tables=names,
                segments=[self._segments[name] for name in names],
                num_embeddings=[table.num_embeddings for table in tables],
                served=served,
                ranks=[self._ranks_of_blocks(table) for table in tables],
                device=device,
            )
        return UniqueRowsInputDist(
            self._owners_group, index, [self._exchanged_dims[name] for name in names], self.checker
        )

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> RowLookup:
        return RowLookup(
            self._kernels,
            device=device or self._device,
            pg=self._env.process_group,
            sharding_type=ShardingType.ROW_WISE,
            env=self._env,
        )

    def create_output_dist(self, device: torch.device | None = None) -> UniqueRowsOutputDist:
        segments = [(self._exchanged_dims[table.name], table) for table in self._tables()]
        return self._output_dist(
            self._owners_group,
            self._flat_rows,
            {
                segment.name: (dim, table.local_cols)
                for dim, table in segments
                for segment in self._segments[table.name]
            },
            self.embedding_dims(),
            codecs_of(self.qcomm_codecs_registry, COMM_OPS["unique_rows"]),
            self._slots,
            self._chunk_selections(),
        )

    def _chunk_selections(self) -> dict[str, torch.Tensor]:
        """Return the columns of the identity that each chunk of a single-layer row has, by segment."""
        if self._slots is None or self._slots.layout.num_chunks == 1:
            return {}
        found = {}
        for table in self._tables():
            identity = torch.eye(self._exchanged_dims[table.name], device=self._device)
            for segment in self._segments[table.name]:
                first = none_throws(segment.index) * table.local_cols
                found[segment.name] = identity[first : first + table.local_cols]
        return found

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        return [self._grouped_embedding_configs]

    def _tables(self) -> list[ShardedEmbeddingTable]:
        """Return the tables in the order of the lookup's rows, which is that of the widths of their vectors."""
        return [table for kernel in self._kernels for table in kernel.embedding_tables]

    def _ranks_of_blocks(self, table: ShardedEmbeddingTable) -> list[int]:
        """Return the rank that owns each block of a table's rows."""
        return [0]


class UniqueRowsSharding(DistinctRowsSharding, RwPooledEmbeddingSharding):
    """Row-wise sharding with the unique_rows exchange of vectors that are pooled."""

    _output_dist = UniqueRowsOutputDist

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        super().__init__(sharding_infos, *args, **kwargs)
        self._owners_group = self._pg

    def _ranks_of_blocks(self, table: ShardedEmbeddingTable) -> list[int]:
        return ranks_of_blocks(none_throws(table.global_metadata).shards_metadata, table.num_embeddings)


class SequenceSharding(UniqueRowsSharding):
    """Row-wise sharding with the unique_rows exchange of vectors that are not pooled."""

    _output_dist = SequenceOutputDist


class ReplicatedSequenceSharding(DistinctRowsSharding, DpPooledEmbeddingSharding):
    """Data-parallel sharding of rows that are not pooled: a rank looks up its batch's distinct rows among its own."""

    _output_dist = SequenceOutputDist

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], env: ShardingEnv, device: torch.device, **_: Any):
        super().__init__(sharding_infos, env, device)
