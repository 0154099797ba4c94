"""What one table costs a rank under each sharding type, exchange and kernel.

b is the local batch, F the features of a table, R the ranks, L those of a node, H the ranks that hold its rows (R, L or
1), u the distinct ids of a rank's batch, U the distinct rows that all ranks ask of one holder.
"""

from dataclasses import dataclass

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingType

from mlet_dist.embeddings.planning.cost_model import (
    FLOAT,
    INDEX,
    LENGTH,
    Memory,
    Optimizer,
    Step,
    all_reduced,
    replicated_bytes,
    row_state_bytes,
)
from mlet_dist.embeddings.sharded.exchange_choice import Exchange, TableTraffic
from mlet_dist.embeddings.sharded.row_lookup import PADDED_BYTES

ROW_WISE = ShardingType.ROW_WISE.value
TABLE_ROW_WISE = ShardingType.TABLE_ROW_WISE.value
TABLE_WISE = ShardingType.TABLE_WISE.value
DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
UVM = EmbeddingComputeKernel.FUSED_UVM.value
UVM_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value

CACHE_LOAD_FACTOR = 0.2
"""fbgemm's and TorchRec's default."""
_CACHE_WAYS = 32  # rows of a set of fbgemm's cache on CUDA


@dataclass(frozen=True)
class TableCost:
    """One table in one sharding type under one exchange and kernel.

    Args:
        name: of the table.
        row_width: k, or d for a single layer.
        projected: whether it has a W2.
        traffic: sizes and batch.
        optimizer: of the rows; W2 takes the same one (adagrad where rows have rowwise_adagrad).
        sharding_type: TorchRec's.
        exchange: how its vectors come home; None for data_parallel.
        world_size: R.
        local_world_size: L.
        kernel: TorchRec's compute kernel.
        cache_load_factor: share of the rows that fused_uvm_caching keeps on the device.
        row_bytes: of a number of W1: 4, or 2 in half precision.
        value_bytes: of a number on the network: of a vector, and of its gradient (``codecs.py``).
        on_cpu: the rows' kernels: on a CPU there is no fused Adam, on CUDA unique rows are padded.
        distinct_ids: u where it was measured, else that of evenly drawn ids.
    """

    name: str
    row_width: int
    projected: bool
    traffic: TableTraffic
    optimizer: Optimizer
    sharding_type: str
    exchange: Exchange | None
    world_size: int
    local_world_size: int
    kernel: str = EmbeddingComputeKernel.FUSED.value
    cache_load_factor: float = CACHE_LOAD_FACTOR
    row_bytes: int = FLOAT
    value_bytes: tuple[int, int] = (FLOAT, FLOAT)
    on_cpu: bool = False
    distinct_ids: float | None = None

    @property
    def holders(self) -> int:
        """H."""
        return {TABLE_WISE: 1, TABLE_ROW_WISE: self._local}.get(self.sharding_type, self.world_size)

    def memory(self, rows: int) -> Memory:
        """Of a rank that holds ``rows`` rows, or none; with what it holds for its own batch."""
        held = self.held_memory(rows) if rows or self.holders == self.world_size else Memory()
        return held + self.home_memory()

    def held_memory(self, rows: int) -> Memory:
        """Of rows, their optimizer's state, and a step's buffers where they are looked up."""
        weights = float(rows * self.row_width * self.row_bytes)
        state = float(rows * row_state_bytes(self.optimizer, self.row_width))
        if self.kernel not in (UVM, UVM_CACHING):
            if self.sharding_type == DATA_PARALLEL or (self.on_cpu and self.optimizer == "adam"):
                state += rows * self.row_width * FLOAT  # the dense gradient
            return Memory(weights, state, self._held_buffers())
        cached = 0.0
        if self.kernel == UVM_CACHING:
            slots = -(-int(rows * self.cache_load_factor) // _CACHE_WAYS) * _CACHE_WAYS
            # And, by TorchRec's count, the table of each row, and state and time stamp of each slot.
            cached = slots * (self.row_width * self.row_bytes + 2 * INDEX) + rows * FLOAT
        # fbgemm keeps one number a row on the device, and more beside the rows.
        on_device = self.optimizer == "rowwise_adagrad"
        return Memory(
            cached, state if on_device else 0, self._held_buffers(), host=weights + (0 if on_device else state)
        )

    def home_memory(self) -> Memory:
        """What every rank holds, wherever the rows are: W2 and its vectors."""
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        buffers = FLOAT * bags * (2 * d if self.projected else d) + INDEX * bags * traffic.pooling_factor
        if self.exchange == "after" and self.world_size > 1:
            buffers += FLOAT * 2 * bags * k
        weights = replicated_bytes(k * d, self.optimizer) if self.projected else 0
        return Memory(buffers=buffers, dense=weights)

    def _held_buffers(self) -> float:
        """What a step holds at its peak, found by the CPU's allocations in ``tests/embeddings/test_planning.py``.

        Pooled tables: sums of all ranks' bags ``(R·b, F·k)``, which are partial where several ranks hold rows, and
        their gradients, and what is exchanged; table_wise ``after``, not both of these beside what is at home.
        data_parallel: a second dense gradient, before it is added to the first. ``unique_rows``: distinct rows
        ``(U, k)`` and their gradients, or rows and both sides of the exchange; a padded copy for tables that share a
        kernel on the CPU, and on CUDA, which was not measured.
        """
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        if self.sharding_type == DATA_PARALLEL:
            return FLOAT * (bags * (2 * k + d) + traffic.num_embeddings * k) + INDEX * ids
        if self.exchange == "unique_rows":
            mine, asked = self._distinct_ids(), self._owned_rows()
            rows = asked * k
            padded = FLOAT * rows <= PADDED_BYTES if self.on_cpu else self.projected
            backward = (3 if padded and self.on_cpu else 4 if padded else 2) * rows + asked * d
            exchanging = (2 if padded else 1) * rows + 2 * mine * d
            return FLOAT * max(backward, exchanging) + 3 * INDEX * ids
        sums = bags * self.world_size
        wide: float = 2 * sums * k
        if self.exchange == "after" and self.sharding_type == TABLE_WISE and self.world_size > 1:
            wide = max(sums, 2 * sums - 2 * bags) * k
        exchanged = 0 if self.exchange == "after" or self.world_size == 1 else sums * d
        received = ids * self.world_size / self.holders
        return FLOAT * (wide + exchanged) + INDEX * received + 2 * INDEX * sums

    def step(self, *, holds: bool = True) -> Step:
        """Of one rank, on average of those that hold rows of the table or of the others."""
        return self.home_step(holds=holds) + (self.held_step() if holds else Step())

    def held_step(self) -> Step:
        """What a rank does because it holds rows of the table."""
        traffic, k, d, world = self.traffic, self.row_width, self.traffic.embedding_dim, self.world_size
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        if self.sharding_type == DATA_PARALLEL:
            dense = 5 * traffic.num_embeddings * (FLOAT * k + row_state_bytes(self.optimizer, k))
            reduced = all_reduced(FLOAT * traffic.num_embeddings * k, world, self.local_world_size)
            return reduced + Step(memory_bytes=FLOAT * (2 * ids * k + bags * 4 * k) + dense)
        asked = self._owned_rows()
        updated: float = 2 * asked * (self.row_bytes * k + row_state_bytes(self.optimizer, k))
        if self.exchange == "unique_rows":
            looked_up = projected = asked
            moved: float = FLOAT * asked * (5 * k + 3 * d) + self.row_bytes * asked * k
        else:
            looked_up = ids * world / self.holders
            projected = 0.0 if self.exchange == "after" else float(bags * world)
            moved = self.row_bytes * 2 * looked_up * k + FLOAT * (bags * world * 4 * k + 3 * projected * d)
        work = Step(memory_bytes=moved + updated, host_bytes=self._host_bytes(looked_up), flops=self._flops(projected))
        return work + self._served()

    def home_step(self, *, holds: bool) -> Step:
        """What a rank does for its own batch: W2's gradient, vectors that arrive, and asking where it holds no row."""
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        reduced = all_reduced(FLOAT * k * d, self.world_size, self.local_world_size) if self.projected else Step()
        at_home = self.exchange in ("after", None)  # W2 is applied here
        moved: float = FLOAT * bags * (2 * k + 3 * d if at_home else 2 * d)
        if self.exchange == "unique_rows":
            moved = FLOAT * (6 * self._distinct_ids() * d + 4 * bags * traffic.pooling_factor * d)
        work = Step(memory_bytes=moved, flops=self._flops(bags) if at_home else 0)
        return reduced + work + (Step() if holds else self._asked())

    def _served(self) -> Step:
        """Over a holder's links. Where all ranks hold rows, each also asks the others for as much."""
        world, local, nodes = self.world_size, self._local, self.world_size // self._local
        vector, gradient = self._vector_bytes()
        bags = self.traffic.local_batch_size * self.traffic.num_features
        ids = INDEX * bags * self.traffic.pooling_factor
        if world == 1:
            return Step()
        inside = (local - 1) / (world - 1)
        if self.sharding_type == TABLE_ROW_WISE:
            within = (vector + gradient) * nodes * (local - 1)
            indices = ids * (local - 1) / local + LENGTH * bags * (local - 1)
            asked = (world - local) * (ids / local + LENGTH * bags)
            return Step(
                vector_bytes=within + vector * (nodes - 1),
                index_bytes=indices,
                node_held=within + indices,
                node_home=within + indices,
                network_held=(vector + gradient) * (nodes - 1) + asked,
            )
        if self.sharding_type == TABLE_WISE:
            through = (world - 1) * (vector + gradient + ids + LENGTH * bags)
            return Step(
                vector_bytes=vector * (world - 1),
                node_held=through * inside,
                network_held=through * (1 - inside),
            )
        sent, indices = (world - 1) * (vector + gradient), ids * (world - 1) / world + LENGTH * bags * (world - 1)
        if self.exchange == "unique_rows":
            rows = self._distinct_ids() * (world - 1) / world
            sent, indices = sum(self.value_bytes) * self.traffic.embedding_dim * rows, INDEX * (rows + world - 1)
        through = sent + indices
        return Step(
            vector_bytes=sent,
            index_bytes=indices,
            node_held=through * inside,
            node_home=through * inside,
            network_held=through * (1 - inside),
            network_home=through * (1 - inside),
        )

    def _asked(self) -> Step:
        """Over the links of a rank that holds no row: its vectors come, ids and gradients go."""
        vector, gradient = self._vector_bytes()
        bags = self.traffic.local_batch_size * self.traffic.num_features
        indices = INDEX * bags * self.traffic.pooling_factor + LENGTH * bags * self.holders
        through = vector + gradient + indices
        # The holder of a table_wise table may be in this rank's node; a node of holders is another one.
        inside = (self._local - 1) / (self.world_size - 1) if self.sharding_type == TABLE_WISE else 0.0
        return Step(
            vector_bytes=gradient,
            index_bytes=indices,
            node_home=through * inside,
            network_home=through * (1 - inside),
        )

    def _vector_bytes(self) -> tuple[float, float]:
        """Of one rank's bags, as they are exchanged: vectors, and their gradients."""
        width = self.row_width if self.exchange == "after" else self.traffic.embedding_dim
        values = self.traffic.local_batch_size * self.traffic.num_features * width
        return values * self.value_bytes[0], values * self.value_bytes[1]

    def _host_bytes(self, looked_up: float) -> float:
        """From the host's memory, where the rows are; as many go back when they are updated.

        A cache hits as often as it has room for rows, which is so for evenly drawn ids; of others it hits more.
        TorchRec's estimate assumes the same.
        """
        if self.kernel not in (UVM, UVM_CACHING):
            return 0
        row, asked = self.row_width * self.row_bytes, self._owned_rows()
        state = 0 if self.optimizer == "rowwise_adagrad" else row_state_bytes(self.optimizer, self.row_width)
        if self.kernel == UVM_CACHING:
            return asked * ((1 - self.cache_load_factor) * row + state)
        return looked_up * row + asked * (row + state)

    def _flops(self, rows: float) -> float:
        """Of a product ``(rows, k)·(k, d)`` and its two gradients."""
        return 6 * rows * self.row_width * self.traffic.embedding_dim if self.projected else 0

    @property
    def _local(self) -> int:
        return min(self.local_world_size, self.world_size)

    def _distinct_ids(self) -> float:
        return self.traffic.distinct_ids() if self.distinct_ids is None else self.distinct_ids

    def _owned_rows(self) -> float:
        """U: no more than what the ranks ask for together."""
        together = min(self.traffic.distinct_ids(self.world_size), self._distinct_ids() * self.world_size)
        return together / self.holders
