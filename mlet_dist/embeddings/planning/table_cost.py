"""The cost of one table for a rank under each sharding type, exchange and kernel.

Notation: b is the local batch size, F the number of features of the table, k and d the widths of W1 and W2, R the
number of ranks, L that of ranks per node, H that of owner ranks (R, L or 1), u the number of distinct ids in a rank's
batch, and U the number of distinct rows that all ranks together request from one owner.

A rank has two roles. As an owner it stores rows and serves the requests of all ranks; as a requester it handles the
vectors of its own batch. Costs are computed for each role.
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
    all_reduce_step,
    replicated_bytes,
    row_state_bytes,
)
from mlet_dist.embeddings.planning.step_collectives import Group
from mlet_dist.embeddings.projection import FEW_ROWS
from mlet_dist.embeddings.sharded.exchange_choice import Exchange, TableTraffic
from mlet_dist.embeddings.sharded.row_lookup import PADDED_BYTES

ROW_WISE = ShardingType.ROW_WISE.value
TABLE_ROW_WISE = ShardingType.TABLE_ROW_WISE.value
TABLE_WISE = ShardingType.TABLE_WISE.value
DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
UVM = EmbeddingComputeKernel.FUSED_UVM.value
UVM_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value

CACHE_LOAD_FACTOR = 0.2
"""The default share of rows in a device's cache, in fbgemm and TorchRec."""

_CACHE_WAYS = 32  # rows per set of fbgemm's set-associative cache on CUDA


@dataclass(frozen=True)
class TableCost:
    """The cost of one table under one sharding type, exchange and kernel.

    Args:
        name: the table's name.
        row_width: k, or d for a single-layer table.
        projected: whether the table has a W2.
        traffic: sizes of the table and its batch.
        optimizer: the optimizer of the rows. W2 has the same one, but adagrad if the rows have rowwise_adagrad.
        sharding_type: TorchRec's sharding type.
        exchange: the table's exchange; None for data_parallel.
        world_size: R.
        local_world_size: L.
        kernel: TorchRec's compute kernel.
        cache_load_factor: the share of rows that fused_uvm_caching keeps on the device.
        row_bytes: bytes of an element of W1: 4, or 2 in half precision.
        value_bytes: bytes on the network of an element of a vector, and of its gradient.
        on_cpu: whether rows are on a CPU, which has no fused Adam; on CUDA unique rows are padded.
        distinct_ids: u if it was measured; by default that of uniformly drawn ids.
        distinct_of_all: the distinct ids of all ranks' batches together, if they were measured.
        num_projections: how many W2 a projected table has; a pool has one for each of its row ranges.
        pooled: whether it is a pool of row ranges.
        sequences: whether the vectors of its ids are not pooled.
        slot_map_bytes: for one of the pools of adaptive tables, the bytes of slots and utilities on all ranks together.
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
    distinct_of_all: float | None = None
    num_projections: int = 1
    pooled: bool = False
    slot_map_bytes: int = 0
    sequences: bool = False

    @property
    def num_owners(self) -> int:
        """H, the number of ranks that own rows of the table."""
        return {TABLE_WISE: 1, TABLE_ROW_WISE: self._local}.get(self.sharding_type, self.world_size)

    @property
    def group(self) -> Group:
        """The tables with which it shares its collectives."""
        return self.sharding_type, self.exchange, self.sequences

    def memory(self, rows: int) -> Memory:
        """Return the memory of a rank that owns ``rows`` rows, possibly 0, in both roles."""
        owned = self.owner_memory(rows) if rows or self.num_owners == self.world_size else Memory()
        return owned + self.requester_memory()

    def owner_memory(self, rows: int) -> Memory:
        """Return the memory of ``rows`` rows, their optimizer state, and the buffers of their lookup in a step."""
        weights = float(rows * self.row_width * self.row_bytes)
        state = float(rows * row_state_bytes(self.optimizer, self.row_width))
        if self.kernel not in (UVM, UVM_CACHING):
            if self.sharding_type == DATA_PARALLEL or (self.on_cpu and self.optimizer == "adam"):
                state += rows * self.row_width * FLOAT  # the dense gradient
            return Memory(weights, state) + self._owner_buffers()
        cached = 0.0
        if self.kernel == UVM_CACHING:
            slots = -(-int(rows * self.cache_load_factor) // _CACHE_WAYS) * _CACHE_WAYS
            # As in TorchRec's estimate: also the state and time stamp of each slot, and the table index of each row.
            cached = slots * (self.row_width * self.row_bytes + 2 * INDEX) + rows * FLOAT
        # fbgemm keeps rowwise_adagrad's state, one number per row, on the device, and other states with the rows.
        on_device = self.optimizer == "rowwise_adagrad"
        stored = Memory(cached, state if on_device else 0, host=weights + (0 if on_device else state))
        return stored + self._owner_buffers()

    def requester_memory(self) -> Memory:
        """Return the memory that every rank needs wherever the rows are: W2 and the vectors of its batch."""
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        vectors = 2 * ids * d if self.sequences else bags * (2 * d if self.projected else d)
        buffers, reused = FLOAT * vectors + INDEX * ids, True
        if self.exchange == "after" and self.world_size > 1:
            reused = not self._writes_in_place(1)
            received = d if self.sharding_type == TABLE_WISE else 2 * d
            buffers += FLOAT * bags * (2 * k if reused else k + received)
        weights = replicated_bytes(k * d * self.num_projections, self.optimizer) if self.projected else 0
        return Memory(dense=weights + self.slot_map_bytes / self.world_size) + _buffers(buffers, reused=reused)

    def step(self, *, owns_rows: bool = True) -> Step:
        """Return the work of a rank: the average over owners of the table, or over the other ranks."""
        return self.requester_step(owns_rows=owns_rows) + (self.owner_step() if owns_rows else Step())

    def owner_step(self) -> Step:
        """Return the work of a rank as an owner of rows."""
        traffic, k, d, world = self.traffic, self.row_width, self.traffic.embedding_dim, self.world_size
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        if self.sharding_type == DATA_PARALLEL:
            dense = 5 * traffic.num_embeddings * (FLOAT * k + row_state_bytes(self.optimizer, k))
            reduced = all_reduce_step(FLOAT * traffic.num_embeddings * k, world, self.local_world_size)
            return reduced + Step(memory_bytes=FLOAT * (2 * ids * k + bags * 4 * k) + dense)
        requested = self._requested_rows()
        updated: float = 2 * requested * (self.row_bytes * k + row_state_bytes(self.optimizer, k))
        if self.exchange == "unique_rows":
            looked_up = projected = requested
            received = self._distinct_ids() * world / self.num_owners
            moved: float = FLOAT * requested * (5 * k + 3 * d) + self.row_bytes * requested * k
        else:
            received, looked_up = 0.0, ids * world / self.num_owners
            projected = 0.0 if self.exchange == "after" else float(bags * world)
            moved = self.row_bytes * 2 * looked_up * k + FLOAT * (bags * world * 4 * k + 3 * projected * d)
        work = Step(
            memory_bytes=moved + updated,
            host_bytes=self._host_bytes(looked_up),
            flops=self._flops(projected),
            sorted_ids=received,
        )
        return work + self._owner_traffic()

    def requester_step(self, *, owns_rows: bool) -> Step:
        """Return the work of a rank for its own batch: W2's gradient, the received vectors, and, if it owns no rows of
        the table, its requests."""
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        weights = FLOAT * k * d * self.num_projections if self.projected else 0
        reduced = all_reduce_step(weights, self.world_size, self.local_world_size)
        projects = self.exchange in ("after", None)  # the requester applies W2
        moved: float = FLOAT * bags * (2 * k + 3 * d if projects else 2 * d)
        ids = bags * traffic.pooling_factor if self.exchange == "unique_rows" else 0
        if self.exchange == "unique_rows":
            moved = FLOAT * (6 * self._distinct_ids() * d + 4 * bags * traffic.pooling_factor * d)
        work = Step(memory_bytes=moved, flops=self._flops(bags) if projects else 0, sorted_ids=ids)
        return reduced + work + (Step() if owns_rows else self._requester_traffic())

    def _owner_buffers(self) -> Memory:
        """Return the temporary tensors at the peak of a step.

        The formulas were fitted to allocations on a CPU (``tests/embeddings/planning/test_planner.py``):

        - Pooled exchanges: the sums ``(R·b, F·k)`` of all ranks' bags, their gradients, and the exchanged vectors.
          table_wise under ``after`` never has the sums and the requester's vectors in full at the same time.
        - data_parallel: a second dense gradient, before it is added to the first.
        - unique_rows: distinct rows ``(U, k)`` and their gradients, or rows and both sides of the exchange. Tables that
          share a padded kernel also have a padded copy; so do projected tables on CUDA, which was not measured.

        What W2 is applied to and its gradient share their memory (``products.py``), except padded rows on CUDA. Then,
        and under ``after`` with table_wise, nothing of it is free while the dense layers compute. Indices of where
        ids occur are kept for backward on a CPU alone.
        """
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        if self.sharding_type == DATA_PARALLEL:
            of_bags = _buffers(FLOAT * bags * (2 * k + d) + INDEX * ids, reused=not self._writes_in_place(1))
            of_rows = FLOAT * traffic.num_embeddings * k
            return of_bags + Memory(buffers=of_rows, gradients=of_rows)
        if self.exchange == "unique_rows":
            distinct, requested = self._distinct_ids(), self._requested_rows()
            rows = requested * k
            padded = self._shares_padded_kernel(rows) if self.on_cpu else self.projected
            in_place, indices = self.projected and self.on_cpu, 5 if self.on_cpu else 3
            backward = (4 if padded and not self.on_cpu else 2 + padded - in_place) * rows + requested * d
            exchanging = (2 if padded else 1) * rows + 2 * distinct * d
            if self.pooled:  # Ids are looked up by range. On CUDA, projected rows are concatenated.
                exchanging += INDEX // FLOAT * ids + (0 if in_place else requested * d)
            size, kept = FLOAT * max(backward, exchanging), FLOAT * rows if in_place else 0
            return Memory(buffers=size + indices * INDEX * ids, gradients=(size - kept) / 2)
        sums = bags * self.world_size
        in_place = self.exchange != "after" and self._writes_in_place(self.world_size)
        wide: float = (1 if in_place else 2) * sums * k
        copies = 2 if in_place and self.sharding_type != TABLE_WISE else int(in_place or self.world_size > 1)
        reused = not in_place
        if self.exchange == "after" and self.sharding_type == TABLE_WISE and self.world_size > 1:
            wide, reused = max(sums, 2 * sums - 2 * bags) * k, False
        exchanged = 0 if self.exchange == "after" else copies * sums * d
        received = ids * self.world_size / self.num_owners
        return _buffers(FLOAT * (wide + exchanged) + INDEX * received + 2 * INDEX * sums, reused=reused)

    def _writes_in_place(self, ranks: int) -> bool:
        """Return whether gradients take the place of the pooled vectors of some ranks' batches, which W2 projects."""
        return self.projected and ranks * self.traffic.local_batch_size >= FEW_ROWS

    def _shares_padded_kernel(self, elements: float) -> bool:
        """Return whether ``row_lookup`` pads the table's rows on a CPU: those with Adam, which has no fused kernel."""
        return self.optimizer == "adam" and FLOAT * elements <= PADDED_BYTES

    def _owner_traffic(self) -> Step:
        """Return the traffic over an owner's links. If all ranks own rows, it includes each owner's own requests."""
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
            requests = (world - local) * (ids / local + LENGTH * bags)
            return Step(
                vector_bytes=within + vector * (nodes - 1),
                index_bytes=indices,
                node_owner_bytes=within + indices,
                node_requester_bytes=within + indices,
                network_owner_bytes=(vector + gradient) * (nodes - 1) + requests,
            )
        if self.sharding_type == TABLE_WISE:
            through = (world - 1) * (vector + gradient + ids + LENGTH * bags)
            return Step(
                vector_bytes=vector * (world - 1),
                node_owner_bytes=through * inside,
                network_owner_bytes=through * (1 - inside),
            )
        sent, indices = (world - 1) * (vector + gradient), ids * (world - 1) / world + LENGTH * bags * (world - 1)
        if self.exchange == "unique_rows":
            rows = self._distinct_ids() * (world - 1) / world
            sent, indices = sum(self.value_bytes) * self.traffic.embedding_dim * rows, INDEX * (rows + world - 1)
        through = sent + indices
        return Step(
            vector_bytes=sent,
            index_bytes=indices,
            node_owner_bytes=through * inside,
            node_requester_bytes=through * inside,
            network_owner_bytes=through * (1 - inside),
            network_requester_bytes=through * (1 - inside),
        )

    def _requester_traffic(self) -> Step:
        """Return the traffic over the links of a rank that owns no rows: vectors in, ids and gradients out."""
        vector, gradient = self._vector_bytes()
        bags = self.traffic.local_batch_size * self.traffic.num_features
        indices = INDEX * bags * self.traffic.pooling_factor + LENGTH * bags * self.num_owners
        through = vector + gradient + indices
        # The owner of a table_wise table may be in this rank's node; owners of table_row_wise are in another node.
        inside = (self._local - 1) / (self.world_size - 1) if self.sharding_type == TABLE_WISE else 0.0
        return Step(
            vector_bytes=gradient,
            index_bytes=indices,
            node_requester_bytes=through * inside,
            network_requester_bytes=through * (1 - inside),
        )

    def _vector_bytes(self) -> tuple[float, float]:
        """Return the bytes of the exchanged vectors of one rank's bags, and of their gradients."""
        width = self.row_width if self.exchange == "after" else self.traffic.embedding_dim
        values = self.traffic.local_batch_size * self.traffic.num_features * width
        return values * self.value_bytes[0], values * self.value_bytes[1]

    def _host_bytes(self, looked_up: float) -> float:
        """Return the bytes read from rows in host memory; the update writes as many back.

        The hit rate of a cache is assumed to equal its share of the rows, which holds for uniformly drawn ids; for
        skewed ids it is higher. TorchRec's estimate assumes the same.
        """
        if self.kernel not in (UVM, UVM_CACHING):
            return 0
        row, requested = self.row_width * self.row_bytes, self._requested_rows()
        state = 0 if self.optimizer == "rowwise_adagrad" else row_state_bytes(self.optimizer, self.row_width)
        if self.kernel == UVM_CACHING:
            return requested * ((1 - self.cache_load_factor) * row + state)
        return looked_up * row + requested * (row + state)

    def _flops(self, rows: float) -> float:
        """Return the flops of a product ``(rows, k)·(k, d)`` and its two gradients."""
        return 6 * rows * self.row_width * self.traffic.embedding_dim if self.projected else 0

    @property
    def _local(self) -> int:
        return min(self.local_world_size, self.world_size)

    def _distinct_ids(self) -> float:
        return self.traffic.distinct_ids() if self.distinct_ids is None else self.distinct_ids

    def _requested_rows(self) -> float:
        """Return U, which is at most the sum of all ranks' distinct ids."""
        together = min(self.traffic.distinct_ids(self.world_size), self._distinct_ids() * self.world_size)
        if self.distinct_of_all is not None:
            together = min(together, self.distinct_of_all)
        return together / self.num_owners


def _buffers(size: float, *, reused: bool = True) -> Memory:
    """Return temporary memory, of which the dense layers can use the half that is for gradients, if ``reused``."""
    return Memory(buffers=size, gradients=size / 2 if reused else 0)
