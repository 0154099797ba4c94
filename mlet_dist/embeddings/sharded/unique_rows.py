"""The unique_rows exchange of row_wise tables: each distinct id of a batch is sent to its owner rank once.

For a rank's batch of b rows and F features:

1. The rank finds its distinct ids and sends them to their owner ranks (two all-to-alls: counts, then ids).
2. Each owner rank merges the requests of all ranks to U distinct rows, looks them up ``(U, k)`` and projects them
   ``(U, d)``, so every requested row is read and projected once. k may differ by table, and by range of rows.
3. The owner ranks send the vectors back (one all-to-all), and the requesting rank pools them: ``(b, F·d)``.

Backward sends the gradients of the vectors the opposite way.
"""

from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.embedding_types import (
    BaseGroupedFeatureProcessor,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable, NoWait, QuantizedCommCodecs, ShardingType
from torchrec.distributed.utils import none_throws
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.embeddings.projection import project_tables
from mlet_dist.embeddings.sharded.collectives import AllToAllRows, codecs_of
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import ranks_of_blocks
from mlet_dist.embeddings.sharded.pooled import (
    ExchangedDims,
    ExchangedShardingInfo,
    ProjectingDist,
    tables_by_feature,
)
from mlet_dist.embeddings.sharded.row_index import RangeIndex, Routing, RowIndex, SlotIndex
from mlet_dist.embeddings.sharded.row_lookup import RowLookup, group_for_rows
from mlet_dist.embeddings.sharded.slot_map import SlotMap


class UniqueRowsContext(EmbeddingShardingContext):
    """TorchRec's per-batch context of one sharding, with the routing of the batch."""

    # Not a dataclass, because the base class is not one in TorchRec 1.6.
    def __init__(self, routing: Routing | None = None, **torchrec_arguments: Any) -> None:
        super().__init__(**torchrec_arguments)
        self.routing = routing

    def record_stream(self, stream: torch.Stream) -> None:
        if self.routing is not None:
            for tensor in self.routing.tensors():
                tensor.record_stream(stream)


class UniqueRowsSharding(ExchangedDims, RwPooledEmbeddingSharding):
    """Row-wise sharding with the unique_rows exchange, for tables with the same d."""

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        super().__init__(sharding_infos, *args, **kwargs)
        expected = {info.embedding_config.name: info.expected_rows for info in sharding_infos}
        self._segments = {info.embedding_config.name: info.segments for info in sharding_infos}
        self._served = {info.embedding_config.name: info.served for info in sharding_infos}
        self._slots = sharding_infos[0].slots
        on_cuda = self._device.type == "cuda"
        self._kernels = group_for_rows(self._grouped_embedding_configs, expected, unpooled=on_cuda)

    def create_input_dist(self, device: torch.device | None = None) -> "UniqueRowsInputDist":
        tables = self._tables()
        served = [
            each
            for group in self._grouped_embedding_configs
            for table in group.embedding_tables
            for each in self._served[table.name]
        ]
        device = device or self._device
        names = [table.name for table in tables]
        if self._slots is not None:
            widths = [pool.width for pool in self._slots.layout.pools]
            pools = {table.name: widths.index(table.local_cols) for table in tables}
            return UniqueRowsInputDist(self._pg, SlotIndex(self._pg, pools, self._slots, served, device))
        index = RangeIndex(
            self._pg,
            tables=names,
            segments=[self._segments[name] for name in names],
            num_embeddings=[table.num_embeddings for table in tables],
            served=served,
            ranks=[ranks_of_blocks(table.global_metadata.shards_metadata, table.num_embeddings) for table in tables],
            device=device,
        )
        return UniqueRowsInputDist(self._pg, index)

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> RowLookup:
        return RowLookup(
            self._kernels,
            device=device or self._device,
            pg=self._pg,
            sharding_type=ShardingType.ROW_WISE,
            env=self._env,
        )

    def create_output_dist(self, device: torch.device | None = None) -> "UniqueRowsOutputDist":
        return UniqueRowsOutputDist(
            self._pg,
            {segment.name: table.local_cols for table in self._tables() for segment in self._segments[table.name]},
            len(tables_by_feature(self._grouped_embedding_configs)),
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
        """Return the tables in the order of the lookup's rows."""
        return [table for kernel in self._kernels for table in kernel.embedding_tables]


class UniqueRowsInputDist(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Maps the ids of a rank's batch to the distinct rows requested from this rank, the input of the lookup.

    Args:
        process_group: the ranks.
        index: finds the owner ranks of ids, and the rows of the tables.
    """

    def __init__(self, process_group: dist.ProcessGroup, index: RowIndex) -> None:
        super().__init__()
        self.process_group = process_group
        self.index = index
        first_keys = torch.arange(dist.get_world_size(process_group) + 1) * index.keys_per_rank
        self._first_keys_of_ranks = first_keys.to(index.device)
        self.routing: Routing

    def forward(self, sparse_features: KeyedJaggedTensor) -> "Awaitable[Awaitable[KeyedJaggedTensor]]":
        """Find the distinct ids, which must lie inside their tables, and send each owner the number of requests."""
        values = sparse_features.values()
        lengths, weights = sparse_features.lengths(), sparse_features.weights_or_none()
        counts = lengths.view(self.index.num_features, -1).sum(dim=1)
        keys, stored = self.index.keys(values, counts)
        distinct, position = torch.unique(keys, return_inverse=True)
        if stored is not None:
            position = torch.full_like(values, distinct.numel()).masked_scatter_(stored, position)
        self.routing = Routing(
            lengths=lengths,
            weights=weights,
            one_id_per_bag=weights is None and lengths.numel() == values.numel() and bool((lengths == 1).all()),
            position_of_id=position,
            some_not_stored=stored is not None,
        )
        requests_sent = torch.searchsorted(distinct, self._first_keys_of_ranks).diff()
        return _CountsAwaitable(self, requests_sent, distinct % self.index.keys_per_rank)

    def lookup_features(self, requested_keys: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the distinct rows among the received requests, as input of the lookup."""
        distinct, routing.position_of_request = torch.unique(requested_keys, return_inverse=True)
        return self.index.lookup_features(distinct, routing)


class _CountsAwaitable(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """The all-to-all of the numbers of requests; its result is the all-to-all of the ids."""

    def __init__(self, input_dist: UniqueRowsInputDist, requests_sent: torch.Tensor, ids: torch.Tensor) -> None:
        super().__init__()
        self._dist, self._routing = input_dist, input_dist.routing
        self._requests_sent, self._ids = requests_sent, ids
        self._requests_received = torch.empty_like(requests_sent)
        self._work = dist.all_to_all_single(
            self._requests_received, requests_sent, group=input_dist.process_group, async_op=True
        )

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        self._work.wait()
        counts = torch.stack([self._requests_sent, self._requests_received])
        self._routing.requests_sent, self._routing.requests_received = counts.tolist()
        return _IdsAwaitable(self._dist, self._routing, self._ids)


class _IdsAwaitable(Awaitable[KeyedJaggedTensor]):
    """The all-to-all of the ids; its result is the input of the lookup."""

    def __init__(self, input_dist: UniqueRowsInputDist, routing: Routing, ids: torch.Tensor) -> None:
        super().__init__()
        self._dist, self._routing, self._ids = input_dist, routing, ids
        self._requested_ids = ids.new_empty(sum(routing.requests_received))
        self._work = dist.all_to_all_single(
            self._requested_ids,
            ids,
            routing.requests_received,
            routing.requests_sent,
            group=input_dist.process_group,
            async_op=True,
        )

    def _wait_impl(self) -> KeyedJaggedTensor:
        self._work.wait()
        return self._dist.lookup_features(self._requested_ids, self._routing)


class UniqueRowsOutputDist(BaseEmbeddingDist[UniqueRowsContext, torch.Tensor, torch.Tensor], ProjectingDist):
    """Maps the distinct rows of the owner ranks, flat, to the pooled vectors ``(b, F·d)`` of this rank's batch.

    Args:
        process_group: the ranks.
        widths: the row width of each segment, by the name of its W2, in the order of the lookup.
        num_features: F.
        codecs: the precision of vectors on the network.
        slots: of adaptive tables; their rows' utilities grow by the norms of the gradients.
        selections: the matrices ``(width, d)`` that take the place of W2 for chunks of single-layer tables.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        widths: dict[str, int],
        num_features: int,
        codecs: QuantizedCommCodecs,
        slots: SlotMap | None = None,
        selections: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._slots, self._selections = slots, selections or {}
        self._process_group = process_group
        self._segments, self._widths, self._num_features = list(widths), list(widths.values()), num_features
        # As in TorchRec, vectors are not rounded if there is no other rank.
        self._codecs = codecs if dist.get_world_size(process_group) > 1 else QuantizedCommCodecs()

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: UniqueRowsContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project each distinct row once, send it to the ranks that requested it, and pool the vectors received."""
        routing = none_throws(none_throws(sharding_ctx).routing)
        weights = self.projections_of(self._segments)
        of_segments = [weights.get(name, self._selections.get(name)) for name in self._segments]
        rows = project_tables(local_embs, routing.rows_per_segment, self._widths, of_segments)
        if routing.rows_with_slot is not None:
            rows = self._with_absent_rows(rows, routing, of_segments)
        rows = rows.index_select(0, routing.position_of_request)
        received = AllToAllRows.apply(
            rows, routing.requests_received, routing.requests_sent, self._process_group, self._codecs
        )
        return NoWait(self._pool(received, routing))

    def _with_absent_rows(
        self, rows: torch.Tensor, routing: Routing, of_segments: list[torch.Tensor | None]
    ) -> torch.Tensor:
        """Return the vectors of all distinct rows ``(U, d)``, zero for those without slot, and note their gradients."""
        slots = none_throws(self._slots)
        number, width = len(none_throws(routing.local_rows)), rows.shape[1]
        vectors = rows.new_zeros(slots.layout.num_chunks * number, width)
        rows = vectors.index_copy(0, none_throws(routing.rows_with_slot), rows)
        if slots.layout.num_chunks > 1:
            rows = rows.view(slots.layout.num_chunks, number, width).sum(dim=0)
        if rows.requires_grad:
            of_parts: dict[int, torch.Tensor] = {}
            if slots.layout.num_chunks > 1:
                detached = (none_throws(each).detach() for each in of_segments)
                of_parts = dict(zip(slots.segments(0), detached, strict=True))
            rows.register_hook(partial(slots.add_gradients, routing.local_rows, of_parts))
        return rows

    def _pool(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        batch_size, width = routing.lengths.numel() // self._num_features, rows.shape[1]
        shape = (batch_size, self._num_features * width)
        if routing.some_not_stored or not rows.shape[0]:
            # The zero row after the last one is that of ids that are not stored. embedding_bag rejects an empty table;
            # padding it keeps the exchange in this rank's backward.
            rows = functional.pad(rows, (0, 0, 0, 1))
        if routing.one_id_per_bag:
            by_row = routing.position_of_id.view(self._num_features, batch_size).t().reshape(-1)
            return rows.index_select(0, by_row).view(shape)
        offsets = torch.zeros(routing.lengths.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(routing.lengths, dim=0, out=offsets[1:])
        pooled = functional.embedding_bag(
            routing.position_of_id,
            rows,
            offsets,
            mode="sum",
            per_sample_weights=None if routing.weights is None else routing.weights.to(rows.dtype),
            include_last_offset=True,
        )
        return pooled.view(self._num_features, batch_size, width).transpose(0, 1).reshape(shape)
