"""Send each distinct id once to its owner, get its d-dimensional vector back, and pool at home."""

from dataclasses import dataclass, field
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

from mlet_dist.embeddings.projection import project_rows
from mlet_dist.embeddings.sharded.collectives import AllToAllRows, codecs_of
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import ranks_of_blocks
from mlet_dist.embeddings.sharded.pooled import ExchangedDims, ExchangedShardingInfo, ProjectsBefore, tables_by_feature
from mlet_dist.embeddings.sharded.row_lookup import RowLookup, group_for_rows


@dataclass
class Routing:
    """Where a batch's rows come from and go to; made at home, completed at the owners.

    Attributes:
        lengths: bag sizes, ``(F·b,)``.
        weights: per-sample weights of the ids, or None.
        one_each: every bag holds one id, unweighted.
        position_of_id: for each id of the batch, its place among this rank's distinct rows.
        requested: distinct rows that this rank asks of each rank.
        asked_for: rows that each rank asks of this one.
        counts: distinct rows that this rank looks up in each table.
        position_of_request: for each row asked for, its place among those.
    """

    lengths: torch.Tensor
    weights: torch.Tensor | None
    one_each: bool
    position_of_id: torch.Tensor
    requested: list[int] = field(default_factory=list)
    asked_for: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    position_of_request: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class UniqueRowsContext(EmbeddingShardingContext):
    """TorchRec's per-batch context of one sharding, with the routing of the batch."""

    # No dataclass: in TorchRec 1.6 the base is none.
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
    """Row-wise sharding of tables of one k and one d, whose distinct rows are exchanged.

    A rank looks up and projects each row that it is asked for once, however many ranks ask for it.
    """

    def __init__(self, sharding_infos: list[ExchangedShardingInfo], *args: Any, **kwargs: Any) -> None:
        super().__init__(sharding_infos, *args, **kwargs)
        expected = {info.embedding_config.name: info.expected_rows for info in sharding_infos}
        on_cuda = self._device.type == "cuda"
        self._kernels = group_for_rows(self._grouped_embedding_configs, expected, unpooled=on_cuda)

    def create_input_dist(self, device: torch.device | None = None) -> "UniqueRowsInputDist":
        tables = self._tables()
        index = {table.name: position for position, table in enumerate(tables)}
        return UniqueRowsInputDist(
            self._pg,
            tables=[table.name for table in tables],
            table_of_feature=[index[name] for name in tables_by_feature(self._grouped_embedding_configs)],
            num_embeddings=[table.num_embeddings for table in tables],
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
            [table.name for table in self._tables()],
            len(tables_by_feature(self._grouped_embedding_configs)),
            codecs_of(self.qcomm_codecs_registry, COMM_OPS["unique_rows"]),
        )

    def _holders(self) -> list[list[GroupedEmbeddingConfig]]:
        return [self._grouped_embedding_configs]

    def _tables(self) -> list[ShardedEmbeddingTable]:
        """In the order of the lookup's rows."""
        return [table for kernel in self._kernels for table in kernel.embedding_tables]


class UniqueRowsInputDist(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Ids of a rank's batch -> the distinct ids that all ranks ask of this one: a key a table, of one bag."""

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        tables: list[str],
        table_of_feature: list[int],
        num_embeddings: list[int],
        ranks: list[list[int]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self._world_size = dist.get_world_size(process_group)
        self._tables = tables
        blocks = [-(-rows // self._world_size) for rows in num_embeddings]
        # key = (owner·T + table)·stride + row at the owner = id + shift of the id's block
        self._stride = max(blocks)
        shifts = [
            (owner * len(tables) + table) * self._stride - block * blocks[table]
            for table, owners in enumerate(ranks)
            for block, owner in enumerate(owners)
        ]

        def constant(name: str, values: list[int]) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64, device=device), persistent=False)

        constant("_blocks", blocks)
        constant("_shifts", shifts)
        constant("_table_of_feature", table_of_feature)
        constant("_first_keys_of_tables", [self._stride * table for table in range(len(tables) + 1)])
        keys_of_rank = self._stride * len(tables)
        constant("_first_keys_of_ranks", [keys_of_rank * rank for rank in range(self._world_size + 1)])
        self.routing: Routing

    def forward(self, sparse_features: KeyedJaggedTensor) -> "Awaitable[Awaitable[KeyedJaggedTensor]]":
        """Find the distinct ids, which must lie inside their tables, and tell each owner how many to expect."""
        values = sparse_features.values()
        lengths, weights = sparse_features.lengths(), sparse_features.weights_or_none()
        counts = lengths.view(self._table_of_feature.numel(), -1).sum(dim=1)
        table = torch.repeat_interleave(self._table_of_feature, counts, output_size=values.numel())
        block = values.div(self._blocks[table], rounding_mode="floor")
        distinct, position = torch.unique(values + self._shifts[table * self._world_size + block], return_inverse=True)
        self.routing = Routing(
            lengths=lengths,
            weights=weights,
            one_each=weights is None and lengths.numel() == values.numel() and bool((lengths == 1).all()),
            position_of_id=position,
        )
        requested = torch.searchsorted(distinct, self._first_keys_of_ranks).diff()
        return _CountsAwaitable(self, requested, distinct % (len(self._tables) * self._stride))

    def lookup_features(self, asked: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """The rows that ranks asked for, found once each, as input of the lookup."""
        distinct, routing.position_of_request = torch.unique(asked, return_inverse=True)
        count = torch.searchsorted(distinct, self._first_keys_of_tables).diff()
        routing.counts = count.tolist()
        return KeyedJaggedTensor(
            self._tables, distinct % self._stride, lengths=count, stride=1, length_per_key=routing.counts
        )


class _CountsAwaitable(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """How many rows each rank asks for."""

    def __init__(self, ids_dist: UniqueRowsInputDist, requested: torch.Tensor, ids: torch.Tensor) -> None:
        super().__init__()
        self._dist, self._routing = ids_dist, ids_dist.routing
        self._requested, self._ids = requested, ids
        self._asked_for = torch.empty_like(requested)
        self._work = dist.all_to_all_single(self._asked_for, requested, group=ids_dist.process_group, async_op=True)

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        self._work.wait()
        self._routing.requested, self._routing.asked_for = torch.stack([self._requested, self._asked_for]).tolist()
        return _IdsAwaitable(self._dist, self._routing, self._ids)


class _IdsAwaitable(Awaitable[KeyedJaggedTensor]):
    def __init__(self, ids_dist: UniqueRowsInputDist, routing: Routing, ids: torch.Tensor) -> None:
        super().__init__()
        self._dist, self._routing, self._ids = ids_dist, routing, ids
        self._asked = ids.new_empty(sum(routing.asked_for))
        self._work = dist.all_to_all_single(
            self._asked, ids, routing.asked_for, routing.requested, group=ids_dist.process_group, async_op=True
        )

    def _wait_impl(self) -> KeyedJaggedTensor:
        self._work.wait()
        return self._dist.lookup_features(self._asked, self._routing)


class UniqueRowsOutputDist(BaseEmbeddingDist[UniqueRowsContext, torch.Tensor, torch.Tensor], ProjectsBefore):
    """Distinct rows ``(U, k)`` at the owners -> pooled vectors ``(b, F·d)`` at home."""

    def __init__(
        self, process_group: dist.ProcessGroup, tables: list[str], num_features: int, codecs: QuantizedCommCodecs
    ) -> None:
        super().__init__()
        self._process_group = process_group
        self._tables, self._num_features = tables, num_features
        # As in TorchRec, what does not leave the rank is not rounded.
        self._codecs = codecs if dist.get_world_size(process_group) > 1 else QuantizedCommCodecs()

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: UniqueRowsContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project each distinct row once, send it to those who asked, pool there."""
        routing = none_throws(none_throws(sharding_ctx).routing)
        weights = self.projections_of(self._tables)
        rows = local_embs
        if weights:
            rows = project_rows(rows, routing.counts, torch.stack([weights[table] for table in self._tables]))
        rows = rows.index_select(0, routing.position_of_request)
        received = AllToAllRows.apply(rows, routing.asked_for, routing.requested, self._process_group, self._codecs)
        return NoWait(self._pool(received, routing))

    def _pool(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        batch_size, width = routing.lengths.numel() // self._num_features, rows.shape[1]
        shape = (batch_size, self._num_features * width)
        if routing.one_each:
            by_row = routing.position_of_id.view(self._num_features, batch_size).t().reshape(-1)
            return rows.index_select(0, by_row).view(shape)
        offsets = torch.zeros(routing.lengths.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(routing.lengths, dim=0, out=offsets[1:])
        pooled = functional.embedding_bag(
            routing.position_of_id,
            # embedding_bag takes no empty table; padding keeps the exchange in this rank's backward.
            rows if rows.shape[0] else functional.pad(rows, (0, 0, 0, 1)),
            offsets,
            mode="sum",
            per_sample_weights=None if routing.weights is None else routing.weights.to(rows.dtype),
            include_last_offset=True,
        )
        return pooled.view(self._num_features, batch_size, width).transpose(0, 1).reshape(shape)
