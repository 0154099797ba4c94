"""What tables cost a rank: bytes held, bytes of a step's buffers, bytes sent, bytes read, flops. Arithmetic alone.

TorchRec's planner (``planning.py``) and `mlet plan` use these numbers. b is the local batch, F the features of a table,
L its ids a bag, R the ranks, u the distinct ids of a rank's batch, U the distinct rows that all ranks ask of one rank.
All numbers are float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

from mlet_dist.embeddings.exchange import Exchange, TableTraffic
from mlet_dist.embeddings.row_lookup import PADDED_BYTES

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]
Way = Exchange | Literal["replicated"]
"""How a table's vectors come together; ``replicated`` is a data_parallel table, whose gradients are all-reduced."""

FLOAT, INDEX, LENGTH = 4, 8, 4
RESERVED_SHARE = 0.15
"""Of a device's memory: for CUDA's context, NCCL and the allocator's gaps. TorchRec's own default."""


_REPLICATED_BYTES = 1 << 24


class _Summable:
    def __add__(self, other: Self) -> Self:
        pairs = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return type(self)(**pairs)


@dataclass(frozen=True)
class Memory(_Summable):
    """Bytes on one rank, by kind.

    Attributes:
        weights: W1's rows of this rank.
        optimizer: their optimizer's state, and a dense gradient where there is one.
        buffers: what a step holds at its peak beyond what stays, activations of the dense layers included.
        dense: what every rank holds: W2 and the dense layers, with gradients and optimizer state.
    """

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    dense: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.buffers + self.dense


@dataclass(frozen=True)
class Step(_Summable):
    """What one rank does in a training step, forward and backward.

    Attributes:
        vector_bytes: vectors and their gradients sent to other ranks (``benchmarks/traffic.py``).
        index_bytes: ids and lengths sent to other ranks.
        weight_bytes: gradients that are all-reduced, counted once.
        memory_bytes: read from and written to the device's memory.
        flops: of W2 and the dense layers.
    """

    vector_bytes: float = 0
    index_bytes: float = 0
    weight_bytes: float = 0
    memory_bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class TableCost:
    """One table under one exchange, on ``world_size`` ranks.

    Args:
        name: of the table.
        row_width: k, or d for a single layer.
        projected: whether it has a W2.
        traffic: sizes and batch.
        optimizer: of the rows; W2 takes the same one (adagrad where rows have rowwise_adagrad).
        way: its exchange.
        world_size: R.
        on_cpu: the rows' kernels: on a CPU there is no fused Adam, on CUDA unique rows are padded.
        distinct_ids: u where it was measured, else that of evenly drawn ids.
    """

    name: str
    row_width: int
    projected: bool
    traffic: TableTraffic
    optimizer: Optimizer
    way: Way
    world_size: int
    on_cpu: bool = False
    distinct_ids: float | None = None

    def memory(self, rows: int) -> Memory:
        """Of a rank that holds ``rows`` rows."""
        elements = rows * self.row_width
        state = rows * row_state_bytes(self.optimizer, self.row_width)
        if self.way == "replicated" or (self.on_cpu and self.optimizer == "adam"):
            state += elements * FLOAT  # the dense gradient
        return Memory(elements * FLOAT, state, self.buffer_bytes(), self.projection_bytes())

    def projection_bytes(self) -> int:
        """W2, its gradient and its optimizer's state, which every rank holds."""
        return replicated_bytes(self.row_width * self.traffic.embedding_dim, self.optimizer) if self.projected else 0

    def buffer_bytes(self) -> float:
        """What a step holds at its peak, found by the CPU's allocations in ``tests/embeddings/test_planning.py``.

        Row-wise pooled tables: partial sums of all ranks' bags ``(R·b, F·k)`` and their gradients, and what is
        exchanged (``after`` keeps that, ``(b, F·k)``, and its gradient for W2). ``unique_rows``: distinct rows
        ``(U, k)`` and their gradients, or rows and both sides of the exchange; a padded copy for tables that share a
        kernel on the CPU, and on CUDA, which was not measured.
        """
        traffic, k, d = self.traffic, self.row_width, self.traffic.embedding_dim
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        home = FLOAT * bags * (2 * d if self.projected else d)
        if self.way == "replicated":
            return FLOAT * bags * (2 * k + d) + home + 2 * INDEX * ids
        if self.way == "unique_rows":
            mine, asked = self._distinct_ids(), self._owned_rows()
            rows = asked * k
            padded = FLOAT * rows <= PADDED_BYTES if self.on_cpu else self.projected
            backward = (3 if padded and self.on_cpu else 4 if padded else 2) * rows + asked * d
            exchanging = (2 if padded else 1) * rows + 2 * mine * d
            return FLOAT * max(backward, exchanging) + home + 4 * INDEX * ids
        lengths = 2 * INDEX * bags * self.world_size
        exchanged = 2 * bags * k if self.way == "after" else bags * d * self.world_size
        if self.world_size == 1:
            exchanged = 0
        return FLOAT * (2 * bags * k * self.world_size + exchanged) + home + 2 * INDEX * ids + lengths

    def step(self) -> Step:
        """Of one rank on average."""
        traffic, k, d, world = self.traffic, self.row_width, self.traffic.embedding_dim, self.world_size
        bags = traffic.local_batch_size * traffic.num_features
        ids = bags * traffic.pooling_factor
        away = (world - 1) / world
        weight_bytes = FLOAT * k * d if self.projected and world > 1 else 0
        if self.way == "replicated":
            weight_bytes += FLOAT * traffic.num_embeddings * k if world > 1 else 0
            dense = 5 * traffic.num_embeddings * (k + row_state_bytes(self.optimizer, k) / FLOAT)
            moved, projected = FLOAT * (2 * ids * k + bags * (4 * k + 3 * d) + dense), bags
            return Step(0, 0, weight_bytes, moved, self._flops(projected))
        updated = 2 * self._owned_rows() * (FLOAT * k + row_state_bytes(self.optimizer, k))
        if self.way == "unique_rows":
            mine, asked = self._distinct_ids(), self._owned_rows()
            moved = FLOAT * (asked * (6 * k + 3 * d) + 6 * mine * d + 4 * ids * d)
            sent = mine * away
            return Step(
                2 * FLOAT * d * sent,
                INDEX * sent + INDEX * (world - 1),
                weight_bytes,
                moved + updated,
                self._flops(asked),
            )
        partial = bags * world
        width = k if self.way == "after" else d
        moved = FLOAT * (2 * ids * k + partial * 4 * k + (3 * d * partial if self.way == "reduce_scatter" else 0))
        vectors = 2 * FLOAT * width * bags * (world - 1)
        indices = INDEX * ids * away + LENGTH * bags * (world - 1)
        return Step(
            vectors, indices, weight_bytes, moved + updated, self._flops(bags if self.way == "after" else partial)
        )

    def _flops(self, rows: float) -> float:
        """Of a product ``(rows, k)·(k, d)`` and its two gradients."""
        return 6 * rows * self.row_width * self.traffic.embedding_dim if self.projected else 0

    def _distinct_ids(self) -> float:
        return self.traffic.distinct_ids() if self.distinct_ids is None else self.distinct_ids

    def _owned_rows(self) -> float:
        """U: no more than what the ranks ask for together."""
        return min(self.traffic.distinct_ids(self.world_size) / self.world_size, self._distinct_ids())


@dataclass(frozen=True)
class DenseCost:
    """The layers that every rank holds beside the tables.

    Args:
        parameters: numbers in them.
        widths: outputs of each layer.
        features: vectors that interact, the dense one included.
        embedding_dim: d.
        local_batch_size: b.
        optimizer: of the run.
        world_size: R.
    """

    parameters: int
    widths: tuple[int, ...]
    features: int
    embedding_dim: int
    local_batch_size: int
    optimizer: Optimizer
    world_size: int

    def memory(self, table_buffers: float = 0) -> Memory:
        """Weights, gradients and state; and activations beyond the tables' buffers.

        Args:
            table_buffers: bytes of all tables' buffers, half of which, the gradients, are free while activations are
                at their peak.
        """
        buffers = max(0, self.activation_bytes() - table_buffers / 2)
        return Memory(dense=replicated_bytes(self.parameters, self.optimizer), buffers=buffers)

    def activation_bytes(self) -> float:
        """Outputs of the layers, the gradient of the widest, the vectors that interact and their products."""
        layers = sum(self.widths) + max(self.widths)
        interaction = 2 * self.features * self.embedding_dim + 2 * self.features**2
        return FLOAT * self.local_batch_size * (layers + interaction)

    def step(self) -> Step:
        """Matrix products and the interaction; every weight is read thrice and updated."""
        flops = 6 * self.local_batch_size * (self.parameters + self.features**2 * self.embedding_dim)
        moved = 3 * self.activation_bytes() + 8 * FLOAT * self.parameters
        return Step(0, 0, FLOAT * self.parameters if self.world_size > 1 else 0, moved, flops)


@dataclass(frozen=True)
class Device:
    """One rank's hardware; bytes, bytes a second in one direction, and float32 operations a second."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory: float
    memory_bandwidth: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float

    @property
    def usable_memory(self) -> float:
        """Without ``RESERVED_SHARE``."""
        return self.memory * (1 - RESERVED_SHARE)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, one part after another, at the hardware's peak rates: launches and waiting are not in them."""

    network: float
    memory: float
    compute: float

    @property
    def total(self) -> float:
        return self.network + self.memory + self.compute

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {"network": self.network, "memory bandwidth": self.memory, "compute": self.compute}
        return max(parts, key=lambda part: parts[part])


def step_time(step: Step, device: Device, world_size: int, local_world_size: int) -> StepTime:
    """Vectors go evenly to all other ranks, inside the node and outside of it at the same time.

    An all-reduce sends 2·(R-1)/R of its bytes over the links of a node; between N nodes, whose ranks share it,
    2·(N-1)/N of them over a node's network cards.
    """
    exchanged = step.vector_bytes + step.index_bytes
    nodes = -(-world_size // local_world_size)
    inside = exchanged * (min(local_world_size, world_size) - 1) / max(1, world_size - 1)
    within = inside + 2 * step.weight_bytes * (world_size - 1) / world_size
    between = exchanged - inside + 2 * step.weight_bytes * (nodes - 1) / nodes / local_world_size
    network = max(within / device.node_bandwidth, between / device.network_bandwidth)
    return StepTime(network, step.memory_bytes / device.memory_bandwidth, step.flops / device.flops)


def row_state_bytes(optimizer: Optimizer, width: int) -> int:
    """Of one row in fbgemm's kernels and in their dense forms alike."""
    return {"sgd": 0, "adagrad": FLOAT * width, "rowwise_adagrad": FLOAT, "adam": 2 * FLOAT * width}[optimizer]


def replicated_bytes(elements: int, optimizer: Optimizer) -> int:
    """Weights, gradients and optimizer state of what every rank holds; rowwise_adagrad is adagrad there."""
    states = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}[optimizer]
    return FLOAT * elements * (2 + states)


def rows_of_rank(num_embeddings: int, row_width: int, world_size: int, *, on_cpu: bool) -> int | None:
    """Rows of the fullest rank of a row_wise table; None where the sharder replicates it.

    That is where some rank would hold no row and the kernel cannot take that (on the CPU) or holding the table whole
    costs little. With a thousand ranks a table of a million rows may leave the last without.
    """
    block = -(-num_embeddings // world_size)
    all_hold_rows = block * (world_size - 1) < num_embeddings
    cheap = FLOAT * num_embeddings * row_width <= _REPLICATED_BYTES
    return None if not all_hold_rows and (on_cpu or cheap) else block


def total_memory(parts: Iterable[Memory]) -> Memory:
    """The sum."""
    return sum(parts, Memory())


def total_step(parts: Iterable[Step]) -> Step:
    """The sum."""
    return sum(parts, Step())


def memory_of_rank(tables: Mapping[str, tuple[TableCost, Sequence[int]]], dense: Memory, rank: int) -> Memory:
    """Everything that one rank holds; ``tables`` are costs with rows by rank."""
    parts = (cost.memory(rows[rank]) for cost, rows in tables.values())
    return total_memory([*parts, dense])


def shortage(tables: Mapping[str, tuple[TableCost, Sequence[int]]], dense: Memory, device_memory: float) -> str:
    """Which table, on which rank, and how many bytes are missing there."""
    world_size = len(next(iter(tables.values()))[1])
    rank = max(range(world_size), key=lambda each: memory_of_rank(tables, dense, each).total)
    needed, usable = memory_of_rank(tables, dense, rank), device_memory * (1 - RESERVED_SHARE)
    name = max(tables, key=lambda table: tables[table][0].memory(tables[table][1][rank]).total)
    cost, rows = tables[name]
    return (
        f"rank {rank} needs {gigabytes(needed.total)} of the {gigabytes(usable)} that are left of "
        f"{gigabytes(device_memory)}, {gigabytes(needed.total - usable)} short; the largest there is table {name!r}: "
        f"{rows[rank]:,} rows of {cost.row_width}, {gigabytes(cost.memory(rows[rank]).total)}"
    )


def gigabytes(size: float) -> str:
    """In 10^9 bytes, three digits."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"
