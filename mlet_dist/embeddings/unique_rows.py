"""Send each distinct id once to its owner, get its d-dimensional vector back, and pool at home."""

from dataclasses import dataclass, field

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.types import Awaitable, NoWait
from torchrec.distributed.utils import none_throws
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.embeddings.exchange import AllToAllRows, ProjectedRowWiseSharding, ProjectionsOf


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
        slots: this rank's lookup returns a rectangle of ``slots`` vectors a table.
        slot_of_request: for each row asked for, its place in the rectangle ``(T·slots)``.
    """

    lengths: torch.Tensor
    weights: torch.Tensor | None
    one_each: bool
    position_of_id: torch.Tensor
    requested: list[int] = field(default_factory=list)
    asked_for: list[int] = field(default_factory=list)
    slots: int = 1
    slot_of_request: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass
class UniqueRowsContext(EmbeddingShardingContext):
    """TorchRec's per-batch context of one sharding, with the routing of the batch."""

    routing: Routing | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        if self.routing is not None:
            for tensor in (self.routing.lengths, self.routing.weights, self.routing.position_of_id):
                if tensor is not None:
                    tensor.record_stream(stream)
            self.routing.slot_of_request.record_stream(stream)


class UniqueRowsSharding(ProjectedRowWiseSharding):
    """Row-wise sharding of tables of one k and one d, whose distinct rows are exchanged.

    A rank looks up and projects each row that it is asked for once, however many ranks ask for it.
    """

    def create_input_dist(self, device: torch.device | None = None) -> "UniqueRowsInputDist":
        tables = [table for group in self._grouped_embedding_configs for table in group.embedding_tables]
        index = {table.name: position for position, table in enumerate(tables)}
        return UniqueRowsInputDist(
            self._pg,
            features=self.feature_names(),
            tables=[table.name for table in tables],
            table_of_feature=[index[name] for name in self.table_of_feature()],
            num_embeddings=[table.num_embeddings for table in tables],
            device=device or self._device,
        )

    def create_output_dist(self, device: torch.device | None = None) -> "UniqueRowsOutputDist":
        return UniqueRowsOutputDist(self._pg, self.table_of_feature(), self.width_of_feature()[0])


class UniqueRowsInputDist(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Ids of a rank's batch -> the distinct ids that all ranks ask of this one, as bags of zero or one id.

    fbgemm's pooled kernel takes a rectangle of bags: ``slots`` for each feature, where a table's first feature holds
    its ids and the others are empty.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        features: list[str],
        tables: list[str],
        table_of_feature: list[int],
        num_embeddings: list[int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self._world_size = dist.get_world_size(process_group)
        self._features, self._tables = features, tables
        blocks = [-(-rows // self._world_size) for rows in num_embeddings]
        self._block = max(blocks)  # one stride for all tables: key = (owner·T + table)·stride + row at the owner
        first_feature = [table_of_feature.index(table) for table in range(len(tables))]

        def constant(name: str, values: list[int]) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64, device=device), persistent=False)

        constant("_blocks", blocks)
        constant("_table_of_feature", table_of_feature)
        constant("_first_feature", first_feature)
        self.routing: Routing

    def forward(self, sparse_features: KeyedJaggedTensor) -> "Awaitable[Awaitable[KeyedJaggedTensor]]":
        """Find the distinct ids, which must lie inside their tables, and tell each owner how many to expect."""
        values = sparse_features.values().long()
        counts = torch.tensor(sparse_features.length_per_key(), device=values.device)
        table = torch.repeat_interleave(self._table_of_feature, counts, output_size=values.numel())
        block = self._blocks[table]
        owner = values.div(block, rounding_mode="floor")
        key = (owner * len(self._tables) + table) * self._block + (values - owner * block)
        distinct, position = torch.unique(key, return_inverse=True)
        stride = len(self._tables) * self._block
        owner_of_row = distinct.div(stride, rounding_mode="floor")
        weights = sparse_features.weights_or_none()
        lengths = sparse_features.lengths()
        self.routing = Routing(
            lengths=lengths,
            weights=weights,
            one_each=weights is None and lengths.numel() == values.numel() and bool((lengths == 1).all()),
            position_of_id=position,
        )
        requested = torch.bincount(owner_of_row, minlength=self._world_size)
        return _CountsAwaitable(self, requested, distinct - owner_of_row * stride)

    def lookup_features(self, asked: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """The rows that ranks asked for, found once each, as input of the lookup."""
        distinct, position = torch.unique(asked, return_inverse=True)
        table = distinct.div(self._block, rounding_mode="floor")
        count = torch.bincount(table, minlength=len(self._tables))
        routing.slots = max(1, int(count.max()))
        slot = torch.arange(distinct.numel(), device=asked.device) - (count.cumsum(0) - count)[table]
        routing.slot_of_request = (table * routing.slots + slot)[position]
        filled = torch.zeros(len(self._features), routing.slots, dtype=torch.int64, device=asked.device)
        filled[self._first_feature[table], slot] = 1
        # Tables follow one another in `distinct` as their features do in the lookup.
        return KeyedJaggedTensor(
            self._features, distinct - table * self._block, lengths=filled.view(-1), stride=routing.slots
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
        self._routing.requested = self._requested.tolist()
        self._routing.asked_for = self._asked_for.tolist()
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


class UniqueRowsOutputDist(BaseEmbeddingDist[UniqueRowsContext, torch.Tensor, torch.Tensor]):
    """Rectangle of rows ``(slots, F·k)`` at the owners -> pooled vectors ``(b, F·d)`` at home."""

    def __init__(self, process_group: dist.ProcessGroup, table_of_feature: list[str], width: int) -> None:
        super().__init__()
        self._process_group = process_group
        self._tables = list(dict.fromkeys(table_of_feature))
        self._num_features = len(table_of_feature)
        self._first_feature = [table_of_feature.index(table) for table in self._tables]
        self._width = width
        self.projections_of: ProjectionsOf

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: UniqueRowsContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project each distinct row once, send it to those who asked, pool there."""
        routing = none_throws(none_throws(sharding_ctx).routing)
        rectangle = local_embs.view(routing.slots, self._num_features, self._width)
        if self._num_features > len(self._tables):
            rectangle = rectangle[:, self._first_feature]
        rows = rectangle.transpose(0, 1)
        weights = self.projections_of(self._tables)
        if weights:
            rows = torch.bmm(rows, torch.stack([weights[table] for table in self._tables]))
        rows = rows.reshape(-1, rows.shape[2]).index_select(0, routing.slot_of_request)
        received = AllToAllRows.apply(rows, routing.asked_for, routing.requested, self._process_group)
        return NoWait(self._pool(received, routing))

    def _pool(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        if routing.one_each:
            pooled = rows.index_select(0, routing.position_of_id)
        else:
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
        batch_size = routing.lengths.numel() // self._num_features
        return (
            pooled.view(self._num_features, batch_size, rows.shape[1])
            .transpose(0, 1)
            .reshape(batch_size, self._num_features * rows.shape[1])
        )
