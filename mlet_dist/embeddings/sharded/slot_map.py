"""The slots and utilities of the rows of adaptive tables on one rank, and the passes that move rows between widths.

FIITED (arXiv:2401.04408) keeps a utility for each part of a row, to which every step adds the L2 norm of its gradient,
and which decays. Here a row has one utility, from the gradient of its d-dimensional vector summed over all lookups of
the global batch: that of a column of W1 is this gradient times a row of W2. Only where rows are cut into chunks, each
chunk has a utility of its own.

A pass considers the rows of a bucket anew: those of the highest utility get the widest slots of the bucket. The passes
of the buckets are spread over the steps of an interval. A slot takes 4 bytes a row, and a utility 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from mlet_dist.embeddings.row_moves import AdaptiveRows, least_squares_inverse, rescaled_state
from mlet_dist.embeddings.slot_layout import SlotLayout

BYTES_PER_ROW = torch.int32.itemsize + torch.bfloat16.itemsize
"""The bytes of the slot and the utility of a row."""

BYTES_PER_BUCKET = torch.int64.itemsize
"""The bytes of the number of moves of a bucket's rows."""

BYTES_PER_STEP = torch.int64.itemsize
"""The bytes of the number of steps."""

_BLOCK_ROWS = 1 << 20  # rows that are counted together, for little memory
_LOW_BITS = 0xFFFF  # those that bfloat16 lacks


@dataclass(frozen=True)
class PoolTensors:
    """This rank's part of a pool.

    Attributes:
        rows: W1 ``(slots, width)``.
        squares: optimizer states that are sums or means of squared gradients, ``(slots, width)`` or ``(slots,)``.
        means: optimizer states that are means of gradients, ``(slots, width)``.
    """

    rows: torch.Tensor
    squares: tuple[torch.Tensor, ...] = ()
    means: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Located:
    """Where the distinct rows of a batch are on this rank.

    Attributes:
        pools: the slots to look up in each pool, in order of their segments, counted from this rank's first.
        rows_per_segment: number of rows of each pool and part that are looked up, pool by pool.
        rows: which of the U rows are looked up, in the order of the lookup; of chunks, which of the G·U, where first
            chunks of all rows come before second ones.
    """

    pools: list[torch.Tensor]
    rows_per_segment: list[int]
    rows: torch.Tensor


class SlotMap:
    """The slots and utilities of the rows that a rank owns.

    A *local row* is the position of a row in ``slots``, flattened; that of its first chunk if rows are cut into chunks.

    Args:
        layout: of the adaptive tables.
        settings: when rows move.
        rank: this rank.
        world_size: R.
        device: of the tensors.

    Attributes:
        slots: the code of each row's slot ``(G·H, buckets of this rank)`` int32; -1 for none.
        utilities: ``slots``'s shape, bfloat16.
        moves: how often rows of each bucket moved ``(1, buckets of this rank)`` int64.
        step: optimizer steps taken, ``()`` int64 on the CPU.

    Raises:
        ValueError: there are more ranks than buckets.
    """

    def __init__(
        self, layout: SlotLayout, settings: AdaptiveRows, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.layout, self.settings, self.device = layout, settings, device
        self.first_bucket = layout.first_bucket(rank, world_size)
        self.stop_bucket = layout.first_bucket(rank + 1, world_size)
        self.step = torch.tensor(0, dtype=torch.int64)
        if device.type == "meta":
            lines = layout.num_chunks * layout.rows_per_bucket
            self.slots = torch.empty(lines, self.num_buckets, dtype=torch.int32, device=device)
        else:
            self.slots = layout.initial_slots(self.first_bucket, self.stop_bucket).to(device)
        self.utilities = torch.zeros(self.slots.shape, dtype=torch.bfloat16, device=device)
        self.moves = torch.zeros(1, self.num_buckets, dtype=torch.int64, device=device)
        self._first_codes = layout.first_codes().to(device)
        self._first_rows = layout.first_rows().to(device)
        self._table_numbers = torch.arange(len(layout.tables) + 1, device=device)
        first_slots = [self.first_bucket * pool.slots_per_bucket for pool in layout.pools]
        self._first_own_codes = self._first_codes + torch.tensor(first_slots, device=device)
        permitted = layout.permitted()
        self._parts_of_pools = [permitted[:, pool].nonzero().squeeze(1).tolist() for pool in range(len(layout.pools))]
        self.set_order(range(len(layout.pools)))

    @property
    def num_buckets(self) -> int:
        """The buckets of this rank."""
        return self.stop_bucket - self.first_bucket

    def segments(self, pool: int) -> list[int]:
        """Return the parts, by index, that may have rows in a pool, in the order of its segments."""
        return list(self._parts_of_pools[pool])

    def set_order(self, pools: Sequence[int]) -> None:
        """Set the order in which ``locate`` returns the pools."""
        segments = torch.full((len(self.layout.pools), self.layout.num_parts), -1, dtype=torch.int64)
        number = 0
        self._order = list(pools)
        for pool in pools:
            for part in self._parts_of_pools[pool]:
                segments[pool, part] = number
                number += 1
        self._num_segments = number
        self._segment_numbers = torch.arange(-1, number, device=self.device)
        self._segments = segments.to(self.device)

    def state(self, process_group: dist.ProcessGroup) -> dict[str, torch.Tensor | ShardedTensor]:
        """Return ``slots``, ``utilities``, ``moves`` and ``step``, not copied; all but the last sharded by columns.

        Slots and utilities are ``(G·H, V)``: row number g is at position g of the flattened tensor, whatever the number
        of ranks.
        """
        return {
            "slots": self._sharded(self.slots, process_group),
            "utilities": self._sharded(self.utilities, process_group),
            "moves": self._sharded(self.moves, process_group),
            "step": self.step,
        }

    def load(self, state: Mapping[str, torch.Tensor | ShardedTensor]) -> None:
        """Copy what ``state`` returned, here or in another process with the same buckets.

        Raises:
            ValueError: a shape differs.
        """
        for name in ("slots", "utilities", "moves", "step"):
            into = getattr(self, name)
            found = state[name]
            values = found.local_shards()[0].tensor if isinstance(found, ShardedTensor) else found
            if values.shape != into.shape:
                raise ValueError(
                    f"{name} of adaptive rows are {tuple(values.shape)} in the state and {tuple(into.shape)} here"
                )
            into.copy_(values)

    def _sharded(self, tensor: torch.Tensor, process_group: dist.ProcessGroup) -> ShardedTensor:
        rows, world_size = tensor.shape[0], dist.get_world_size(process_group)
        starts = [self.layout.first_bucket(rank, world_size) for rank in range(world_size + 1)]
        shards = [
            ShardMetadata([0, start], [rows, stop - start], f"rank:{rank}/{tensor.device}")
            for rank, (start, stop) in enumerate(pairwise(starts))
        ]
        own = shards[dist.get_rank(process_group)]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(tensor, own)],
            ShardedTensorMetadata(
                shards_metadata=shards,
                size=torch.Size([rows, self.layout.num_buckets]),
                tensor_properties=TensorProperties(dtype=tensor.dtype),
            ),
            process_group=process_group,
        )

    def row_numbers(self, local_rows: torch.Tensor) -> torch.Tensor:
        """Return the numbers of local rows among the rows of all tables."""
        within, bucket = local_rows // self.num_buckets, local_rows % self.num_buckets
        return within * self.layout.num_buckets + bucket + self.first_bucket

    def _parts_of(self, local_rows: torch.Tensor) -> torch.Tensor:
        """Return the part of each local row."""
        return torch.searchsorted(self._first_rows, self.row_numbers(local_rows), right=True) - 1

    def kept_rows(self) -> torch.Tensor:
        """Return how many of this rank's rows have a slot, for each range of ``layout.row_ranges()``, int64."""
        kept = (self.slots.view(self.layout.num_chunks, -1) >= 0).any(dim=0)
        rows = torch.tensor([rows for _, rows, _ in self.layout.row_ranges()])
        ends = rows.cumsum(0).to(self.device)
        found = torch.zeros_like(ends)
        for start in range(0, len(kept), _BLOCK_ROWS):
            local_rows = start + kept[start : start + _BLOCK_ROWS].nonzero().squeeze(1)
            ranges = torch.searchsorted(ends, self.row_numbers(local_rows), right=True)
            found += torch.bincount(ranges, minlength=len(ends))
        return found

    def locate(self, local_rows: torch.Tensor) -> Located:
        """Find the slots of distinct local rows ``(U,)``, and of all their chunks, ``(G·U,)``."""
        local_rows = self._with_chunks(local_rows)
        codes = self.slots.view(-1)[local_rows].long()
        pools = torch.searchsorted(self._first_codes, codes, right=True) - 1
        segments = self._segments[pools, self._parts_of(local_rows)]
        segments = torch.where(codes < 0, self._num_segments, segments)
        segments, order = segments.sort(stable=True)
        # Not bincount, which waits for the device twice on CUDA.
        counts = torch.searchsorted(segments, self._segment_numbers, right=True).diff().tolist()
        stored = sum(counts)
        slots = (codes - self._first_own_codes[pools])[order[:stored]]
        per_pool, start = [], 0
        for pool in self._order:
            of_pool = len(self._parts_of_pools[pool])
            per_pool.append(sum(counts[start : start + of_pool]))
            start += of_pool
        return Located(list(slots.split(per_pool)), counts, order[:stored])

    @torch.no_grad()
    def add_gradients(
        self, local_rows: torch.Tensor, projections: Mapping[int, torch.Tensor], gradients: torch.Tensor
    ) -> None:
        """Add the norms of the gradients ``(U, d)`` of the vectors of distinct local rows to their utilities.

        With chunks, ``local_rows`` are ascending, ``projections`` has the W2 ``(width, d)`` of each part, and the
        utility of a chunk grows by the norm of its own gradient, which it would have had if it had a slot.

        Sums are rounded to bfloat16 up or down, in turns that depend on the step and the row alone, so that small
        gradients are not lost on average. A gradient that is not finite counts as zero.
        """
        norms = (
            gradients.float().norm(dim=1)
            if self.layout.num_chunks == 1
            else self._norms(local_rows, projections, gradients.float())
        )
        norms.nan_to_num_(nan=0.0, posinf=0.0)
        local_rows = self._with_chunks(local_rows)
        utilities = self.utilities.view(-1)
        utilities[local_rows] = self._rounded(utilities[local_rows].float() + norms, local_rows)

    def _rounded(self, utilities: torch.Tensor, local_rows: torch.Tensor) -> torch.Tensor:
        """Return utilities ``(n,)`` of local rows in bfloat16, rounded up or down in turns."""
        dither = (self.row_numbers(local_rows) * 40_503 + int(self.step) * 30_011) & _LOW_BITS
        return ((utilities.view(torch.int32) + dither.int()) & ~_LOW_BITS).view(torch.float32).bfloat16()

    def _with_chunks(self, local_rows: torch.Tensor) -> torch.Tensor:
        """Return the local rows of all chunks ``(G·U,)``."""
        if self.layout.num_chunks == 1:
            return local_rows
        chunks = torch.arange(self.layout.num_chunks, device=self.device).unsqueeze(1)
        return (chunks * (self.layout.rows_per_bucket * self.num_buckets) + local_rows).view(-1)

    def _norms(
        self, local_rows: torch.Tensor, projections: Mapping[int, torch.Tensor], gradients: torch.Tensor
    ) -> torch.Tensor:
        """Return the norms of the gradients of all chunks ``(G·U,)``, of local rows in ascending order."""
        num_tables = len(self.layout.tables)
        norms = gradients.new_zeros(self.layout.num_chunks, len(local_rows))
        # Rows in ascending order are those of one table after the other.
        bounds = torch.searchsorted(self._parts_of(local_rows), self._table_numbers).tolist()
        for table, (start, stop) in enumerate(pairwise(bounds)):
            chunks = [
                projections[part] for part in range(table, self.layout.num_parts, num_tables) if part in projections
            ]
            if chunks and start < stop:
                products = gradients[start:stop] @ torch.cat(chunks).t()
                norms[: len(chunks), start:stop] = products.view(stop - start, len(chunks), -1).norm(dim=2).t()
        return norms.view(-1)

    def due(self) -> list[int]:
        """Return this rank's buckets whose pass is due after ``step`` steps.

        Consecutive passes are far apart among the buckets, so that those of a step are on different ranks.
        """
        every, after = self.settings.interval, int(self.step) - self.settings.warmup
        if after < 0:
            return []
        start, stop = (-(-each * self.layout.num_buckets // every) for each in (after % every, after % every + 1))
        buckets = (self.layout.bucket_of_pass(number) for number in range(start, stop))
        return sorted(bucket for bucket in buckets if self.first_bucket <= bucket < self.stop_bucket)

    @torch.no_grad()
    def move_rows(
        self, buckets: Sequence[int], pools: list[PoolTensors], projections: Mapping[tuple[int, int], torch.Tensor]
    ) -> int:
        """Give the slots of buckets to their rows of the highest utility, and move values and optimizer state.

        Args:
            buckets: some of this rank's, ascending.
            pools: this rank's part of each pool.
            projections: W2 ``(width, d)`` by pool and part; whole rows of d columns have none.

        Returns:
            The number of rows that moved.
        """
        columns = torch.tensor(buckets, device=self.device) - self.first_bucket
        lines = torch.arange(self.slots.shape[0], device=self.device)
        local_rows = (lines * self.num_buckets + columns.unsqueeze(1)).view(-1)
        rows_of_chunk = self.layout.rows_per_bucket * self.layout.num_buckets
        local_rows = local_rows[self.row_numbers(local_rows) % rows_of_chunk < self.layout.num_rows]
        columns = local_rows % self.num_buckets
        parts = self._parts_of(local_rows)
        slots, utilities = self.slots.view(-1), self.utilities.view(-1)
        codes, utility = slots[local_rows].long(), utilities[local_rows].float()
        found = self.layout.choose_slots(columns + self.first_bucket, parts, utility, codes, self.settings.hysteresis)
        utilities[local_rows] = self._rounded(utility * self.settings.decay, local_rows)
        moved = (found != codes).nonzero().squeeze(1)
        if not len(moved):
            return 0
        self._move(codes[moved], found[moved], parts[moved], pools, projections)
        self.moves.view(-1).index_add_(0, columns[moved], torch.ones_like(moved))
        slots[local_rows] = found.int()
        return len(moved)

    def _move(
        self,
        old_codes: torch.Tensor,
        new_codes: torch.Tensor,
        parts: torch.Tensor,
        pools: list[PoolTensors],
        projections: Mapping[tuple[int, int], torch.Tensor],
    ) -> None:
        """Copy the values and the optimizer state of rows from slots to slots of other pools; -1 is no slot."""
        old, new = (torch.searchsorted(self._first_codes, codes, right=True) - 1 for codes in (old_codes, new_codes))
        kinds, kind, counts = torch.stack([old, new, parts], dim=1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        rows_of_kinds = kind.argsort(stable=True).split(counts.tolist())
        inverse_of = cache(lambda pool, part: least_squares_inverse(projections[pool, part]))
        writes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for (source, target, part), rows in zip(kinds.tolist(), rows_of_kinds, strict=True):
            if target < 0:
                continue
            into, after = new_codes[rows] - self._first_own_codes[target], pools[target]
            squares, means = (
                [state.new_zeros(into.shape + state.shape[1:]) for state in states]
                for states in (after.squares, after.means)
            )
            vectors = after.rows.new_zeros(len(into), self.layout.pools[target].width)
            if source >= 0 and (target < source or self.settings.on_move == "project"):
                before, from_pool = pools[source], old_codes[rows] - self._first_own_codes[source]
                widths = self.layout.pools[source].width, self.layout.pools[target].width
                squares = [rescaled_state(state[from_pool], *widths) for state in before.squares]
                means, vectors = [state[from_pool] for state in before.means], before.rows[from_pool]
                if (source, part) in projections:
                    vectors = vectors @ projections[source, part]
                    means = [each @ inverse_of(source, part).t() for each in means]
                if (target, part) in projections:
                    vectors = vectors @ inverse_of(target, part)
                    means = [each @ projections[target, part].t() for each in means]
            tensors = zip((after.rows, *after.squares, *after.means), (vectors, *squares, *means), strict=True)
            writes += [(tensor, into, values) for tensor, values in tensors]
        # Rows may exchange their slots, so all are read before the first is written.
        for tensor, rows, values in writes:
            tensor[rows] = values
