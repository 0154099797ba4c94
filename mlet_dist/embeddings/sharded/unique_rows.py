"""The unique_rows exchange of row_wise tables: each distinct id of a batch is sent to its owner rank once.

For a rank's batch of b rows and F features:

1. The rank finds its distinct ids and sends them to their owner ranks (two all-to-alls: counts, then ids).
2. Each owner rank merges the requests of all ranks to U distinct rows, looks them up ``(U, k)`` and projects them
   ``(U, d)``, so every requested row is read and projected once. k may differ by table, and by range of rows.
3. The owner ranks send the vectors back (one all-to-all), and the requesting rank pools them: ``(b, sum of d)``. For
   sequences it puts them in the order of its N ids instead: ``(N, d)``.

Backward sends the gradients of the vectors the opposite way. All tables share these four collectives, whatever their k
and d. A single rank has nobody to exchange with and leaves them out.

Up to the all-to-all of the counts, nothing waits for a device: TorchRec's pipelines do this ahead of the forward pass
of the batch before. The host waits twice: for the counts, and on the owner rank for the numbers of rows of the tables.
"""

from functools import partial
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.types import Awaitable, NoWait, QuantizedCommCodecs
from torchrec.distributed.utils import none_throws
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, _pin_and_move

from mlet_dist.embeddings.projection import project_tables
from mlet_dist.embeddings.sharded.batch_agreement import BatchChecker, CheckResult
from mlet_dist.embeddings.sharded.collectives import AllToAllRows
from mlet_dist.embeddings.sharded.flat_rows import FlatRows
from mlet_dist.embeddings.sharded.occurrences import pool, sorted_distinct
from mlet_dist.embeddings.sharded.pooled import ProjectingDist
from mlet_dist.embeddings.sharded.row_index import Routing, RowIndex, num_owners
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


class UniqueRowsInputDist(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Maps the ids of a rank's batch to the distinct rows requested from this rank, the input of the lookup.

    Args:
        process_group: the ranks; None if every rank has all rows, so that nothing is exchanged.
        index: finds the owner ranks of ids, and the rows of the tables.
        dims: d of each table, ascending.
        checker: has checked the batch; the ranks' results are exchanged with the counts.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, index: RowIndex, dims: list[int], checker: BatchChecker
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self.index = index
        self.world_size = num_owners(process_group)
        self.num_widths = len(set(dims))
        self._checker = checker
        constant = partial(torch.tensor, dtype=torch.int64, device=index.device)
        first_keys = [index.first_keys[dims.index(dim)] for dim in dict.fromkeys(dims)]
        self._first_keys_of_widths = constant(first_keys)
        self._end = self.world_size * index.keys_per_rank
        starts = [rank * index.keys_per_rank + first for rank in range(self.world_size) for first in first_keys]
        self._first_keys = constant([*starts, self._end])
        self.routing: Routing

    def forward(self, sparse_features: KeyedJaggedTensor) -> "Awaitable[Awaitable[KeyedJaggedTensor]]":
        """Find the distinct ids, which must lie inside their tables, and send each owner the number of requests."""
        values = sparse_features.values()
        lengths, weights = sparse_features.lengths(), sparse_features.weights_or_none()
        counts = lengths.view(self.index.num_features, -1).sum(dim=1)
        distinct, occurrences = sorted_distinct(self.index.keys(values, counts), self._end)
        self.routing = Routing(
            lengths=lengths,
            weights=weights,
            ids_per_feature=sparse_features.length_per_key(),
            ids=occurrences,
            some_not_stored=self.index.some_not_stored,
        )
        single = weights is None and lengths.numel() == values.numel()
        return _CountsAwaitable(
            self,
            requests_sent=torch.searchsorted(distinct, self._first_keys).diff().view(self.world_size, -1),
            one_id_per_bag=(lengths == 1).all() if single else None,
            keys=distinct,
            check_result=self._checker.latest,
        )

    def lookup_features(self, requested: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the distinct rows among the received requests, as input of the lookup."""
        if self.num_widths > 1:
            routing.width_of_request = self.widths_of(requested)
        if self.world_size > 1:
            requested, routing.requests = sorted_distinct(requested, self.index.keys_per_rank)
        return self.index.lookup_features(requested, routing)

    def widths_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the position of each key's width among the W; keys are counted from the first of their rank."""
        return torch.searchsorted(self._first_keys_of_widths, keys, right=True) - 1


class _CountsAwaitable(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """The all-to-all of the numbers of requests; its result is the all-to-all of the ids.

    With its numbers of requests, each rank sends the result of checking its batch to all others.
    """

    def __init__(
        self,
        input_dist: UniqueRowsInputDist,
        requests_sent: torch.Tensor,
        one_id_per_bag: torch.Tensor | None,
        keys: torch.Tensor,
        check_result: CheckResult,
    ) -> None:
        super().__init__()
        self._dist, self._routing = input_dist, input_dist.routing
        self._one_id_per_bag, self._keys, self._check_result = one_id_per_bag, keys, check_result
        code = check_result.code.expand(input_dist.world_size, 1)
        self._sent = self._received = torch.cat([requests_sent, code], dim=1)
        self._work: dist.Work | None = None
        if input_dist.world_size > 1:
            self._received = torch.empty_like(self._sent)
            self._work = dist.all_to_all_single(
                self._received, self._sent, group=input_dist.process_group, async_op=True
            )

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        if self._work is not None:
            self._work.wait()
        numbers = [self._sent.view(-1), self._received.view(-1)]
        if self._one_id_per_bag is not None:
            numbers.append(self._one_id_per_bag.long().view(1))
        found = np.array(torch.cat(numbers).tolist(), dtype=np.int64)
        size = self._sent.numel()
        sent, received = (found[start : start + size].reshape(self._sent.shape) for start in (0, size))
        routing = self._routing
        routing.requests_sent, routing.requests_received = sent[:, :-1], received[:, :-1]
        routing.one_id_per_bag = self._one_id_per_bag is not None and bool(found[-1])
        if self._dist.process_group is not None:
            self._check_result.agree(int(received[:, -1].max()))
        ids = self._keys[: int(routing.requests_sent.sum())] % self._dist.index.keys_per_rank
        if self._dist.num_widths > 1:
            routing.width_of_id = self._dist.widths_of(ids)
        return _IdsAwaitable(self._dist, routing, ids)


class _IdsAwaitable(Awaitable[KeyedJaggedTensor]):
    """The all-to-all of the ids; its result is the input of the lookup."""

    def __init__(self, input_dist: UniqueRowsInputDist, routing: Routing, ids: torch.Tensor) -> None:
        super().__init__()
        self._dist, self._routing = input_dist, routing
        self._ids = self._requested_ids = ids
        self._work: dist.Work | None = None
        if input_dist.world_size > 1:
            send, receive = (
                requests.sum(axis=1).tolist() for requests in (routing.requests_sent, routing.requests_received)
            )
            self._requested_ids = ids.new_empty(sum(receive))
            self._work = dist.all_to_all_single(
                self._requested_ids, ids, receive, send, group=input_dist.process_group, async_op=True
            )

    def _wait_impl(self) -> KeyedJaggedTensor:
        if self._work is not None:
            self._work.wait()
        return self._dist.lookup_features(self._requested_ids, self._routing)


class UniqueRowsOutputDist(BaseEmbeddingDist[UniqueRowsContext, torch.Tensor, torch.Tensor], ProjectingDist):
    """Maps the distinct rows of the owner ranks, flat, to the pooled vectors ``(b, sum of d)`` of this rank's batch.

    Args:
        process_group: the ranks; None if every rank has all rows.
        flat_rows: the W widths of vectors.
        segments: d and the row width of each segment, by the name of its W2, in the order of the lookup.
        dims: d of each of the F features.
        codecs: the precision of vectors on the network.
        slots: of adaptive tables; their rows' utilities grow by the norms of the gradients.
        selections: the matrices ``(width, d)`` that take the place of W2 for chunks of single-layer tables.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        flat_rows: FlatRows,
        segments: dict[str, tuple[int, int]],
        dims: list[int],
        codecs: QuantizedCommCodecs,
        slots: SlotMap | None = None,
        selections: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._slots, self._selections = slots, selections or {}
        self._process_group, self._world_size = process_group, num_owners(process_group)
        self._flat_rows, self._segments = flat_rows, segments
        self._codecs = codecs
        self._widths = np.array(flat_rows.widths, dtype=np.int64)
        # The features in runs of the same d, with the position of d among the W.
        positions = [flat_rows.widths.index(dim) for dim in dims]
        self._runs = [(width, len(list(run))) for width, run in groupby(positions)]
        self._num_features = len(dims)

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: UniqueRowsContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Project each distinct row once, send it to the ranks that requested it, and pool the vectors received."""
        routing = none_throws(none_throws(sharding_ctx).routing)
        vectors = self._requested(self._project(local_embs, routing), routing)
        if self._world_size > 1:
            send, receive = (
                (requests @ self._widths).tolist() for requests in (routing.requests_received, routing.requests_sent)
            )
            vectors = AllToAllRows.apply(vectors, send, receive, self._process_group, self._codecs)
        return NoWait(self._assemble(vectors, routing))

    def _project(self, rows: torch.Tensor, routing: Routing) -> list[torch.Tensor]:
        """Return the vectors of the distinct rows, ``(number, d)`` for each d."""
        weights = self.projections_of(list(self._segments))
        of_segments = [weights.get(name, self._selections.get(name)) for name in self._segments]
        dims, widths = zip(*self._segments.values(), strict=True)
        vectors = project_tables(rows, routing.rows_per_segment, widths, dims, of_segments)
        if routing.rows_with_slot is None:
            return vectors
        return [self._with_absent_rows(each, routing, of_segments) for each in vectors]

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

    def _requested(self, vectors: list[torch.Tensor], routing: Routing) -> torch.Tensor:
        """Return the vector of each received request, flat: the requests of one rank after those of another."""
        requests = routing.requests
        if len(vectors) == 1:
            (only,) = vectors
            return (only if requests is None else requests.rows(only)).view(-1)
        flat = torch.cat([each.reshape(-1) for each in vectors])
        if requests is None:  # the requests of a single rank are in the order of the rows
            return flat
        counts = [len(each) for each in vectors]
        numbers = _pin_and_move(torch.tensor(counts), flat.device)
        width_of_row = torch.repeat_interleave(numbers, output_size=sum(counts))
        size = int((routing.requests_received @ self._widths).sum())
        return self._flat_rows.gather(
            flat, width_of_row, requests.position, none_throws(routing.width_of_request), size
        )

    def _assemble(self, flat: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Pool the vectors received, flat, to ``(b, sum of d)``."""
        rows, position, firsts = self._by_width(flat, routing)
        if len(rows) == 1:
            only = _padded(rows[0], routing)
            if not routing.one_id_per_bag:
                return routing.ids.pooled(only, routing.lengths, routing.weights, self._num_features)
            vectors = routing.ids.transposed(self._num_features).rows(only)
            return vectors.view(vectors.shape[0] // self._num_features, self._num_features * vectors.shape[1])
        batch_size = routing.lengths.numel() // self._num_features
        pooled: list[torch.Tensor] = []
        feature, start = 0, 0
        for width, number in self._runs:
            stop = start + sum(routing.ids_per_feature[feature : feature + number])
            bags = slice(feature * batch_size, (feature + number) * batch_size)
            pooled.append(
                _pool_bags(
                    rows[width],
                    _within(position[start:stop], firsts[width], rows[width]),
                    routing.lengths[bags],
                    None if routing.weights is None else routing.weights[start:stop],
                    number,
                    routing,
                )
            )
            feature, start = feature + number, stop
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def _by_width(self, flat: torch.Tensor, routing: Routing) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
        """Return the rows of each width, the position of each id if they are put one after another, and their firsts.

        An id whose row is not stored has the position after the last row.
        """
        counts = routing.requests_sent.sum(axis=0).tolist()
        firsts = list(accumulate(counts, initial=0))
        position = routing.ids.position
        if routing.width_of_id is not None and self._world_size > 1:
            ordered, order = routing.width_of_id.sort(stable=True)
            flat = self._flat_rows.gather(flat, routing.width_of_id, order, ordered, flat.numel())
            moved_to = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            position = functional.pad(moved_to, (0, 1), value=len(order))[position]
        return self._flat_rows.split(flat, counts), position, firsts


class SequenceOutputDist(UniqueRowsOutputDist):
    """Maps the distinct rows of the owner ranks, flat, to the vectors ``(N, d)`` of this rank's N ids.

    All features have vectors of the same width.
    """

    def _assemble(self, flat: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the vector of each id."""
        (rows,), position, _ = self._by_width(flat, routing)
        rows = _padded(rows, routing)
        # On CUDA the backward of an embedding adds without atomics, unlike that of index_select.
        return functional.embedding(position, rows) if rows.is_cuda else routing.ids.rows(rows)


def _padded(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return the rows with a row of zeros after the last one if a batch may ask for it, or if there is no other row."""
    # It is the row of ids that are not stored. embedding_bag rejects an empty table, and an empty table that is padded
    # keeps the exchange in this rank's backward.
    return functional.pad(rows, (0, 0, 0, 1)) if routing.some_not_stored or not rows.shape[0] else rows


def _within(position: torch.Tensor, first: int, rows: torch.Tensor) -> torch.Tensor:
    """Return positions among ``rows``, the first of which has the position ``first``; that after all is after these."""
    return (position - first).clamp(max=rows.shape[0])


def _pool_bags(
    rows: torch.Tensor,
    position: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor | None,
    num_features: int,
    routing: Routing,
) -> torch.Tensor:
    """Pool rows ``(n, d)`` to the vectors ``(b, F·d)`` of some features.

    Args:
        rows: the distinct rows.
        position: of each id of the bags.
        lengths: bag sizes, feature by feature, ``(F·b,)``.
        weights: of the ids, if any.
        num_features: F.
        routing: of the batch.
    """
    rows = _padded(rows, routing)
    if not routing.one_id_per_bag:
        return pool(rows, position, lengths, weights, num_features)
    batch_size = lengths.numel() // num_features
    by_row = position.view(num_features, batch_size).t().reshape(-1)
    return rows.index_select(0, by_row).view(batch_size, num_features * rows.shape[1])
