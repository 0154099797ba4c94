"""From the ids of a batch to their owner ranks, and on an owner rank to the rows of the tables that it stores.

An id is turned into a *key*. The keys of rank r are [r·keys_per_rank, (r + 1)·keys_per_rank), so that sorted keys are
grouped by owner rank. Two indices differ in what a key says:

- ``RangeIndex``: segment and row. Rows of tables without row ranges, and of those whose ranges do not change.
- ``SlotIndex``: the row of an adaptive table, whose slot only the owner rank knows, and only until rows move.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, _pin_and_move

from mlet_dist.embeddings.row_order import RowOrder, stored_rows
from mlet_dist.embeddings.sharded.occurrences import Occurrences
from mlet_dist.embeddings.sharded.pooled import ServedFeature
from mlet_dist.embeddings.sharded.slot_map import SlotMap
from mlet_dist.embeddings.table_config import Segment


@dataclass
class Routing:
    """Where the rows of one batch are requested from and sent to.

    A rank has two roles: it requests the rows of its own batch, and it serves the rows that it owns. Vectors have one
    of W widths, and the tables come in order of the width of their vectors.

    Attributes:
        lengths: bag sizes of the own batch, ``(F·b,)``.
        weights: per-sample weights of the ids, or None.
        ids_per_feature: the number of ids of each feature of the own batch.
        ids: where this rank's distinct ids occur in the batch. Ids of rows that are not stored have the position after
            the last.
        one_id_per_bag: whether every bag has exactly one id and no weight.
        some_not_stored: whether there may be such ids.
        requests_sent: number of rows of each width that this rank requests from each rank, ``(R, W)``.
        requests_received: number of rows of each width that each rank requests from this rank, ``(R, W)``.
        width_of_id: the position of each distinct id's width among the W; None if W is 1.
        rows_per_segment: number of distinct rows that this rank looks up in each segment of a table; the sum is U.
        requests: where the U rows occur among the received requests; None if requests and rows are the same.
        width_of_request: like ``width_of_id``, of each received request.
        local_rows: with a SlotIndex, the distinct rows among the received requests, ``(U,)``; some may have no slot.
        rows_with_slot: with a SlotIndex, which of them are looked up, in the order of the lookup (``Located.rows``).
    """

    lengths: torch.Tensor
    weights: torch.Tensor | None
    ids_per_feature: list[int]
    ids: Occurrences
    one_id_per_bag: bool = False
    some_not_stored: bool = False
    requests_sent: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    requests_received: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    width_of_id: torch.Tensor | None = None
    rows_per_segment: list[int] = field(default_factory=list)
    requests: Occurrences | None = None
    width_of_request: torch.Tensor | None = None
    local_rows: torch.Tensor | None = None
    rows_with_slot: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors."""
        own = [each for each in vars(self).values() if isinstance(each, torch.Tensor)]
        return own + self.ids.tensors() + ([] if self.requests is None else self.requests.tensors())


class RowIndex(ABC):
    """Base of the two indices.

    Attributes:
        device: of the ids.
        keys_per_rank: as above.
        first_keys: the first key of each table of a rank, counted from the rank's first; ascending.
        num_features: F, the features of a batch.
        some_not_stored: whether there are ids whose rows are not stored.
    """

    device: torch.device
    keys_per_rank: int
    first_keys: list[int]
    num_features: int
    some_not_stored: bool = False

    @abstractmethod
    def keys(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the keys of the ids; that of a row that is not stored is R·keys_per_rank. Does not wait for a device.

        Args:
            ids: of all features, one after the other.
            counts: the ids of each feature, ``(F,)``.
        """

    @abstractmethod
    def lookup_features(self, keys: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the input of the lookup for distinct keys that this rank owns. Waits for the device once.

        Args:
            keys: counted from this rank's first, sorted; behind them any number of keys that are ``keys_per_rank``.
            routing: of the batch; it receives what the owner rank must know.
        """


class RangeIndex(RowIndex):
    """The index of rows that stay where they are.

    Args:
        tables: names of the T tables that store rows, in the order of the lookup.
        segments: the segments of each of them, in the order of its parts.
        num_embeddings: rows of each.
        served: the features of the batch in order, each of one of the T tables, or of one with row ranges.
        ranks: for each table, the owner rank of each block of rows.
        device: device of the ids.
    """

    def __init__(
        self,
        tables: list[str],
        segments: list[tuple[Segment, ...]],
        num_embeddings: list[int],
        served: list[ServedFeature],
        ranks: list[list[int]],
        device: torch.device,
    ) -> None:
        constant = partial(torch.tensor, dtype=torch.int64, device=device)
        self._world_size = len(ranks[0])
        self._tables = tables
        self.device, self.num_features = device, len(served)
        blocks = [-(-rows // self._world_size) for rows in num_embeddings]
        # Key of an id = (owner·S + segment)·stride + row in the owner's shard = stored row + shift of the row's block,
        # so that sorted keys are grouped by owner, and by segment for each owner. S is the number of segments.
        table_of_segment = [table for table, own in enumerate(segments) for _ in own]
        self._stride, number = max(blocks), len(table_of_segment)
        self.keys_per_rank = self._stride * number
        self.first_keys = [self._stride * table_of_segment.index(table) for table in range(len(tables))]
        shifts = [
            (owner * number + segment) * self._stride - block * blocks[table]
            for segment, table in enumerate(table_of_segment)
            for block, owner in enumerate(ranks[table])
        ]
        # The model's tables one after the other, cut into ranges of rows that are stored in one segment or not at all.
        rows_of_tables = {each.table: each.num_embeddings for each in served}
        first_row_of = dict(zip(rows_of_tables, accumulate(rows_of_tables.values(), initial=0), strict=False))
        # Each has a segment, a step and an offset: id i has row i·step + offset of the segment. Ids that share a row
        # have step 0.
        ranges = {start: (-1, 1, 0) for start in first_row_of.values()}
        for index, segment in enumerate(segment for own in segments for segment in own):
            start = first_row_of[segment.table] + segment.first_row
            stop = start + segment.rows
            ranges[start] = (index, 1, -start)
            if segment.shared_by:
                ranges[stop] = (index, 0, segment.rows - 1)
            ranges.setdefault(stop + segment.shared_by, (-1, 1, 0))
        ranges = {start: ranges[start] for start in sorted(ranges)}
        self._has_ranges = any(segment.index is not None for own in segments for segment in own)
        of_ranges = [segment for segment, _, _ in ranges.values()]
        self.some_not_stored = -1 in of_ranges[:-1] or max(ranges) < sum(rows_of_tables.values())

        orders = [RowOrder(tuple(segment.rows for segment in own)) for own in segments]
        self._first_stored = torch.cat([order.first_stored for order in orders]).to(device)
        self._blocks = constant([blocks[table] for table in table_of_segment])
        self._shifts = constant(shifts)
        self._first_rows = constant(list(ranges))
        self._segment_of_range = constant(of_ranges)
        self._step_of_range = constant([step for _, step, _ in ranges.values()])
        self._offset_of_range = constant([offset for _, _, offset in ranges.values()])
        self._first_row_of_feature = constant([first_row_of[each.table] for each in served])
        self._segment_of_feature = constant([ranges[first_row_of[each.table]][0] for each in served])
        self._first_keys_of_segments = constant([self._stride * segment for segment in range(number + 1)])
        self._num_segments = [len(own) for own in segments]

    def keys(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        segment, row = self._segment_rows(ids, counts)
        if not self.some_not_stored:
            return self._keys_of_rows(segment, row)
        stored = segment >= 0
        keys = self._keys_of_rows(torch.where(stored, segment, 0), torch.where(stored, row, 0))
        return torch.where(stored, keys, self._world_size * self.keys_per_rank)

    def _keys_of_rows(self, segment: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        row = stored_rows(self._first_stored, row, segment)
        block = row.div(self._blocks[segment], rounding_mode="floor")
        return row + self._shifts[segment * self._world_size + block]

    def lookup_features(self, keys: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the rows of the tables, one key with one bag per table."""
        routing.rows_per_segment = torch.searchsorted(keys, self._first_keys_of_segments).diff().tolist()
        of_segments = iter(routing.rows_per_segment)
        counts = [sum(islice(of_segments, number)) for number in self._num_segments]
        return one_bag_per_table(self._tables, keys[: sum(counts)] % self._stride, counts)

    def _segment_rows(self, ids: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the segment of each id and the row in it; the segment of a row that is not stored is -1."""

        def by_feature(constants: torch.Tensor) -> torch.Tensor:
            return torch.repeat_interleave(constants, counts, output_size=ids.numel())

        if not self._has_ranges:
            return by_feature(self._segment_of_feature), ids
        rows = ids + by_feature(self._first_row_of_feature)
        found = torch.searchsorted(self._first_rows, rows, right=True) - 1
        return self._segment_of_range[found], rows * self._step_of_range[found] + self._offset_of_range[found]


class SlotIndex(RowIndex):
    """The index of the rows of adaptive tables; ``locate`` completes the lookup's input once no row moves any more.

    Args:
        process_group: the ranks.
        pools: names of the pools in the order of the lookup, and their position in the layout.
        slots: the slots of this rank's rows.
        served: the features of the batch in order.
        device: device of the ids.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        pools: dict[str, int],
        slots: SlotMap,
        served: list[ServedFeature],
        device: torch.device,
    ) -> None:
        constant = partial(torch.tensor, dtype=torch.int64, device=device)
        layout, world_size = slots.layout, dist.get_world_size(process_group)
        self.slots = slots
        self.device, self.num_features = device, len(served)
        self._pools = list(pools)
        slots.set_order(list(pools.values()))
        starts = [layout.first_bucket(rank, world_size) for rank in range(world_size + 1)]
        sizes = [stop - start for start, stop in pairwise(starts)]
        self.keys_per_rank = layout.rows_per_bucket * max(sizes)
        self.first_keys = [0] * len(pools)
        first_row_of = dict(zip(layout.tables, layout.first_rows().tolist(), strict=False))  # of the first chunk
        self._num_buckets = layout.num_buckets
        self._keys_per_rank = constant([self.keys_per_rank])
        # Key of row g in bucket b of rank r = r·keys_per_rank + (g // V)·(buckets of r) + b - (first bucket of r).
        self._first_row_of_feature = constant([first_row_of[each.table] for each in served])
        owners = [rank for rank, size in enumerate(sizes) for _ in range(size)]
        self._buckets_of_owner = constant([sizes[owner] for owner in owners])
        shifts = [owner * self.keys_per_rank + bucket - starts[owner] for bucket, owner in enumerate(owners)]
        self._shifts = constant(shifts)

    def keys(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        rows = ids + torch.repeat_interleave(self._first_row_of_feature, counts, output_size=ids.numel())
        bucket = rows % self._num_buckets
        within = rows.div(self._num_buckets, rounding_mode="floor")
        return within * self._buckets_of_owner[bucket] + self._shifts[bucket]

    def lookup_features(self, keys: torch.Tensor, routing: Routing) -> KeyedJaggedTensor:
        """Return the rows in one bag of one key, for ``locate``, which waits for the device once more."""
        (number,) = torch.searchsorted(keys, self._keys_per_rank).tolist()
        routing.local_rows = keys[:number]
        return one_bag_per_table(["rows"], routing.local_rows, [number])

    def locate(self, routing: Routing) -> KeyedJaggedTensor:
        """Return the slots of the pools, one key with one bag per pool."""
        assert routing.local_rows is not None
        located = self.slots.locate(routing.local_rows)
        routing.rows_per_segment, routing.rows_with_slot = located.rows_per_segment, located.rows
        return one_bag_per_table(self._pools, torch.cat(located.pools), [len(each) for each in located.pools])


def num_owners(process_group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks that share the rows of tables: those of a process group, or one, if each has all."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def one_bag_per_table(tables: list[str], rows: torch.Tensor, counts: list[int]) -> KeyedJaggedTensor:
    """Return ``rows`` as one bag for each of ``tables``, of ``counts`` rows."""
    lengths = _pin_and_move(torch.tensor(counts, dtype=torch.int64), rows.device)
    return KeyedJaggedTensor(tables, rows, lengths=lengths, stride=1, length_per_key=counts)
