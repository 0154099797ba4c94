"""The unique_rows exchange of row_wise tables: each distinct id of a batch is sent to its owner rank once.

For a rank's batch of b rows and F features:

1. The rank finds its distinct ids and sends them to their owner ranks (two all-to-alls: counts, then ids).
2. Each owner rank merges the requests of all ranks to U distinct rows, looks them up ``(U, k)`` and projects them
   ``(U, d)``, so every requested row is read and projected once. k may differ by table, and by range of rows.
3. The owner ranks send the vectors back (one all-to-all), and the requesting rank pools them: ``(b, F·d)``.

Backward sends the gradients of the vectors the opposite way.
"""

from dataclasses import dataclass, field
from itertools import accumulate, islice
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
from mlet_dist.embeddings.sharded.row_lookup import RowLookup, group_for_rows
from mlet_dist.embeddings.table_config import Segment


@dataclass
class Routing:
    """Where the rows of one batch are requested from and sent to.

    A rank has two roles: it requests the rows of its own batch, and it serves the rows that it owns.

    Attributes:
        lengths: bag sizes of the own batch, ``(F·b,)``.
        weights: per-sample weights of the ids, or None.
        one_id_per_bag: whether every bag has exactly one id and no weight.
        position_of_id: position of each id of the batch among this rank's distinct ids.
        requests_sent: number of rows that this rank requests from each rank.
        requests_received: number of rows that each rank requests from this rank.
        some_not_stored: whether the batch may have ids of rows that are not stored; they have the position after the
            last distinct id.
        rows_per_segment: number of distinct rows that this rank looks up in each segment of a table; the sum is U.
        position_of_request: position of each received request among the U rows.
    """

    lengths: torch.Tensor
    weights: torch.Tensor | None
    one_id_per_bag: bool
    position_of_id: torch.Tensor
    requests_sent: list[int] = field(default_factory=list)
    requests_received: list[int] = field(default_factory=list)
    rows_per_segment: list[int] = field(default_factory=list)
    position_of_request: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    some_not_stored: bool = False


class UniqueRowsContext(EmbeddingShardingContext):
    """TorchRec's per-batch context of one sharding, with the routing of the batch."""

    # Not a dataclass, because the base class is not one in TorchRec 1.6.
    def __init__(self, routing: Routing | None = None, **torchrec_arguments: Any) -> None:
        super().__init__(**torchrec_arguments)
        self.routing = routing

    def record_stream(self, stream: torch.Stream) -> None:
        if self.routing is not None:
            for tensor in (self.routing.lengths, self.routing.weights, self.routing.position_of_id):
                if tensor is not None:
                    tensor.record_stream(stream)
            self.routing.position_of_request.record_stream(stream)


class UniqueRowsSharding(ExchangedDims, RwPooledEmbeddingSharding):
    """Row-wise sharding with the unique_rows exchange, for tables with the same d."""

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        super().__init__(sharding_infos, *args, **kwargs)
        expected = {info.embedding_config.name: info.expected_rows for info in sharding_infos}
        self._segments = {info.embedding_config.name: info.segments for info in sharding_infos}
        self._served = {info.embedding_config.name: info.served for info in sharding_infos}
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
        return UniqueRowsInputDist(
            self._pg,
            tables=[table.name for table in tables],
            segments=[self._segments[table.name] for table in tables],
            num_embeddings=[table.num_embeddings for table in tables],
            table_of_feature=[each.table for each in served],
            rows_of_tables={each.table: each.num_embeddings for each in served},
            ranks=[ranks_of_blocks(table.global_metadata.shards_metadata, table.num_embeddings) for table in tables],
            device=device or self._device,
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
        )

    def _owners(self) -> list[list[GroupedEmbeddingConfig]]:
        return [self._grouped_embedding_configs]

    def _tables(self) -> list[ShardedEmbeddingTable]:
        """Return the tables in the order of the lookup's rows."""
        return [table for kernel in self._kernels for table in kernel.embedding_tables]


class UniqueRowsInputDist(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Maps the ids of a rank's batch to the distinct rows requested from this rank, one key with one bag per table.

    Args:
        process_group: the ranks.
        tables: names of the T tables that store rows, in the order of the lookup.
        segments: the segments of each of them.
        num_embeddings: rows of each.
        table_of_feature: the table of each feature, as the model sees it: one of the T, or one with row ranges.
        rows_of_tables: rows of each table that the model sees.
        ranks: for each table, the owner rank of each block of rows.
        device: device of the ids.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        tables: list[str],
        segments: list[tuple[Segment, ...]],
        num_embeddings: list[int],
        table_of_feature: list[str],
        rows_of_tables: dict[str, int],
        ranks: list[list[int]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self._world_size = dist.get_world_size(process_group)
        self._tables = tables
        blocks = [-(-rows // self._world_size) for rows in num_embeddings]
        # Key of an id = (owner·T + table)·stride + row in the owner's shard = id + shift of the id's block, so that
        # sorted keys are grouped by owner, and by table for each owner.
        self._stride = max(blocks)
        shifts = [
            (owner * len(tables) + table) * self._stride - block * blocks[table]
            for table, owners in enumerate(ranks)
            for block, owner in enumerate(owners)
        ]

        def constant(name: str, values: list[int]) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64, device=device), persistent=False)

        # The model's tables one after the other, cut into ranges of rows that are stored in one table or not at all.
        first_row_of = dict(zip(rows_of_tables, accumulate(rows_of_tables.values(), initial=0), strict=False))
        ranges = {start: (-1, 0) for start in first_row_of.values()}
        for table, own in enumerate(segments):
            for segment in own:
                start = first_row_of[segment.table] + segment.first_row
                ranges[start] = (table, segment.offset - start)
                ranges.setdefault(start + segment.rows, (-1, 0))
        ranges = {start: ranges[start] for start in sorted(ranges)}
        self._has_ranges = any(segment.index is not None for own in segments for segment in own)
        of_tables = [table for table, _ in ranges.values()]
        self._some_not_stored = -1 in of_tables[:-1] or max(ranges) < sum(rows_of_tables.values())

        constant("_blocks", blocks)
        constant("_shifts", shifts)
        constant("_first_rows", list(ranges))
        constant("_table_of_range", of_tables)
        constant("_offset_of_range", [offset for _, offset in ranges.values()])
        constant("_first_row_of_feature", [first_row_of[name] for name in table_of_feature])
        constant("_table_of_feature", [ranges[first_row_of[name]][0] for name in table_of_feature])
        rank = dist.get_rank(process_group)
        own_rows = [(blocks[table] * owners.index(rank), blocks[table]) for table, owners in enumerate(ranks)]
        starts = [
            self._stride * table + min(max(segment.offset - first, 0), rows)
            for table, (first, rows) in enumerate(own_rows)
            for segment in segments[table]
        ]
        constant("_first_keys_of_segments", [*starts, self._stride * len(tables)])
        self._num_segments = [len(own) for own in segments]
        keys_of_rank = self._stride * len(tables)
        constant("_first_keys_of_ranks", [keys_of_rank * rank for rank in range(self._world_size + 1)])
        self.routing: Routing

    def forward(self, sparse_features: KeyedJaggedTensor) -> "Awaitable[Awaitable[KeyedJaggedTensor]]":
        """Find the distinct ids, which must lie inside their tables, and send each owner the number of requests."""
        values = sparse_features.values()
        lengths, weights = sparse_features.lengths(), sparse_features.weights_or_none()
        counts = lengths.view(self._table_of_feature.numel(), -1).sum(dim=1)
        table, row, stored = self._stored_rows(values, counts)
        block = row.div(self._blocks[table], rounding_mode="floor")
        distinct, position = torch.unique(row + self._shifts[table * self._world_size + block], return_inverse=True)
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
        return _CountsAwaitable(self, requests_sent, distinct % (len(self._tables) * self._stride))

    def _stored_rows(
        self, ids: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the table and the row of each id that is stored, and which ids are, or None if all of them are."""

        def by_feature(constants: torch.Tensor) -> torch.Tensor:
            return torch.repeat_interleave(constants, counts, output_size=ids.numel())

        if not self._has_ranges:
            return by_feature(self._table_of_feature), ids, None
        rows = ids + by_feature(self._first_row_of_feature)
        found = torch.searchsorted(self._first_rows, rows, right=True) - 1
        table, row = self._table_of_range[found], rows + self._offset_of_range[found]
        if not self._some_not_stored:
            return table, row, None
        stored = table >= 0
        return table[stored], row[stored], stored

    def lookup_features(self, requested_ids: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the distinct rows among the received requests, as input of the lookup."""
        distinct, routing.position_of_request = torch.unique(requested_ids, return_inverse=True)
        routing.rows_per_segment = torch.searchsorted(distinct, self._first_keys_of_segments).diff().tolist()
        of_segments = iter(routing.rows_per_segment)
        counts = [sum(islice(of_segments, number)) for number in self._num_segments]
        lengths = torch.tensor(counts, dtype=torch.int64, device=distinct.device)
        return KeyedJaggedTensor(
            self._tables, distinct % self._stride, lengths=lengths, stride=1, length_per_key=counts
        )


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
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        widths: dict[str, int],
        num_features: int,
        codecs: QuantizedCommCodecs,
    ) -> None:
        super().__init__()
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
        of_segments = [weights.get(name) for name in self._segments]
        rows = project_tables(local_embs, routing.rows_per_segment, self._widths, of_segments)
        rows = rows.index_select(0, routing.position_of_request)
        received = AllToAllRows.apply(
            rows, routing.requests_received, routing.requests_sent, self._process_group, self._codecs
        )
        return NoWait(self._pool(received, routing))

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
