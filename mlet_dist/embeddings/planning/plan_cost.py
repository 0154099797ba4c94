"""The cost of a whole plan: of each table as TorchRec has sharded it, and of a rank with all its tables."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import CacheParams, ParameterSharding
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.cost_model import (
    FLOAT,
    RESERVED_SHARE,
    Device,
    Memory,
    Optimizer,
    Step,
    StepTime,
    all_reduced,
    gigabytes,
    replicated_bytes,
    step_time,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.planning.table_cost import (
    CACHE_LOAD_FACTOR,
    DATA_PARALLEL,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    TableCost,
)
from mlet_dist.embeddings.sharded.collectives import codecs_of, each_way_bytes
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import rows_of_rank
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder

# Of fbgemm's optimizers, by the name of the class that apply_optimizer_in_backward was given.
_OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": "sgd",
    "Adagrad": "adagrad",
    "RowWiseAdagrad": "rowwise_adagrad",
    "Adam": "adam",
}


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are, R, how many in a node, L, and whether they compute on a CPU."""

    world_size: int
    local_world_size: int
    on_cpu: bool

    @classmethod
    def of(cls, topology: Topology) -> "Ranks":
        """Those of TorchRec's topology, whose pods are nodes here: ranks with fast links to one another."""
        return cls(topology.world_size, topology.intra_group_size, topology.compute_device == "cpu")

    def holders(self, sharding_type: str) -> int:
        """Ranks over which a table is split."""
        return {TABLE_WISE: 1, TABLE_ROW_WISE: self.local_world_size}.get(sharding_type, self.world_size)


def serves(table: MultiLayerEmbeddingBagConfig, sharding_type: str, ranks: Ranks) -> bool:
    """False where the sharder would make a table by blocks data_parallel, because it has too few rows."""
    if sharding_type not in (ROW_WISE, TABLE_ROW_WISE):
        return True
    blocks = ranks.holders(sharding_type)
    return rows_of_rank(table.num_embeddings, table.row_width, blocks, on_cpu=ranks.on_cpu) is not None


def table_cost(
    table: MultiLayerEmbeddingBagConfig,
    rows: torch.Tensor,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
    sharding_type: str = ROW_WISE,
    kernel: str = EmbeddingComputeKernel.FUSED.value,
    cache_load_factor: float = CACHE_LOAD_FACTOR,
) -> TableCost:
    """The cost of a table under a sharding type; data_parallel where that leaves ranks without rows.

    Args:
        rows: W1, on any device, which knows its optimizer (``apply_optimizer_in_backward``).
    """
    if not serves(table, sharding_type, ranks):
        sharding_type = DATA_PARALLEL
    replicated = sharding_type == DATA_PARALLEL
    exchange = None if replicated else sharder.choose(table, sharding_type, ranks.world_size)[0]
    value_bytes = FLOAT, FLOAT
    if exchange is not None and ranks.world_size > 1:
        operation = COMM_OPS["all_to_all" if sharding_type == TABLE_WISE else exchange]
        value_bytes = each_way_bytes(codecs_of(sharder.qcomm_codecs_registry, operation))
    return TableCost(
        name=table.name,
        row_width=table.row_width,
        projected=table.hidden_dim is not None,
        traffic=sharder.traffic(table),
        optimizer=optimizer_of(rows),
        sharding_type=sharding_type,
        exchange=exchange,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        kernel=EmbeddingComputeKernel.DENSE.value if replicated else kernel,
        cache_load_factor=cache_load_factor,
        # Replicated rows stay float32 (sharding.py).
        row_bytes=2 if table.data_type == DataType.FP16 and not replicated else FLOAT,
        value_bytes=value_bytes,
        on_cpu=ranks.on_cpu,
    )


def table_costs(
    module: MultiLayerEmbeddingBagCollection,
    params: dict[str, ParameterSharding],
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
) -> dict[str, tuple[TableCost, list[int]]]:
    """Each table's cost and its rows by rank, in a plan that ``sharder.settle`` has settled."""
    found = {}
    for table in module.embedding_bag_configs():
        sharding = params[table.name]
        spec = sharding.sharding_spec
        rows = [table.num_embeddings if spec is None else 0] * ranks.world_size
        for shard in [] if spec is None else spec.shards:
            rows[shard.placement.rank()] += shard.shard_sizes[0]
        cost = table_cost(
            table,
            module.embedding_bags[table.name].weight,
            sharder,
            ranks,
            sharding.sharding_type,
            sharding.compute_kernel,
            load_factor(sharding.cache_params),
        )
        found[table.name] = (cost, rows)
    return found


def load_factor(cache: CacheParams | None) -> float:
    """The share of rows in a cache; fbgemm's default where nothing is said."""
    return CACHE_LOAD_FACTOR if cache is None or cache.load_factor is None else cache.load_factor


def optimizer_of(rows: torch.Tensor) -> Optimizer:
    """The optimizer that ``apply_optimizer_in_backward`` gave to W1; SGD where it gave none.

    Raises:
        ValueError: the state of this optimizer is not known.
    """
    kinds: list[Callable[..., Any]] = getattr(rows, "_optimizer_classes", [])
    if not kinds:
        return "sgd"
    name = getattr(kinds[0], "__name__", str(kinds[0]))
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer {name} of the rows: its state is not known; known are {', '.join(_OPTIMIZERS)}")
    return _OPTIMIZERS[name]


Tables = Mapping[str, tuple[TableCost, Sequence[int]]]
"""Each table's cost and its rows by rank."""


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
        local_world_size: L.
    """

    parameters: int
    widths: tuple[int, ...]
    features: int
    embedding_dim: int
    local_batch_size: int
    optimizer: Optimizer
    world_size: int
    local_world_size: int

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
        reduced = all_reduced(FLOAT * self.parameters, self.world_size, self.local_world_size)
        return reduced + Step(memory_bytes=moved, flops=flops)


def memory_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Memory:
    """Everything that one rank holds."""
    held = total_memory(cost.memory(rows[rank]) for cost, rows in tables.values())
    return held + dense.memory(held.buffers)


def step_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Step:
    """Everything that one rank does in a step."""
    return total_step([*(cost.step(holds=_holds(cost, rows[rank])) for cost, rows in tables.values()), dense.step()])


def slowest_step(tables: Tables, dense: DenseCost, device: Device) -> tuple[Step, StepTime]:
    """The step of the rank that takes longest."""
    steps = [step_of_rank(tables, dense, rank) for rank, *_ in alike(tables)]
    return max(((step, step_time(step, device)) for step in steps), key=lambda each: each[1].total)


def fullest_memory(tables: Tables, dense: DenseCost) -> Memory:
    """That of the rank whose device holds most; ``host`` is the most that any rank's host holds."""
    memories = [memory_of_rank(tables, dense, rank) for rank, *_ in alike(tables)]
    fullest = max(memories, key=lambda each: each.total)
    return dataclasses.replace(fullest, host=max(each.host for each in memories))


def shortage(tables: Tables, dense: DenseCost, memory: float, host_memory: float = 0) -> str:
    """Which table, on which rank, and how many bytes are missing there, on the device or else on the host."""
    memories = {rank: memory_of_rank(tables, dense, rank) for rank, *_ in alike(tables)}
    rank = max(memories, key=lambda each: memories[each].total)
    needed, given, where = memories[rank].total, memory, ""
    if needed <= given * (1 - RESERVED_SHARE):
        host_rank = max(memories, key=lambda each: memories[each].host)
        if memories[host_rank].host > host_memory * (1 - RESERVED_SHARE):
            rank, needed, given, where = host_rank, memories[host_rank].host, host_memory, " of its host"
    usable = given * (1 - RESERVED_SHARE)

    def of_table(name: str) -> float:
        cost, rows = tables[name]
        held = cost.memory(rows[rank])
        return held.host if where else held.total

    name = max(tables, key=of_table)
    cost, rows = tables[name]
    return (
        f"rank {rank} needs {gigabytes(needed)}{where} of the {gigabytes(usable)} that are left of "
        f"{gigabytes(given)}, {gigabytes(needed - usable)} short; the largest there is table {name!r}: "
        f"{rows[rank]:,} rows of {cost.row_width}, {gigabytes(of_table(name))}"
    )


def _holds(cost: TableCost, rows: int) -> bool:
    return rows > 0 or cost.holders == cost.world_size


def alike(tables: Tables) -> list[list[int]]:
    """Ranks that hold the same numbers of rows, together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, held in enumerate(zip(*(rows for _, rows in tables.values()), strict=True)):
        found.setdefault(held, []).append(rank)
    return list(found.values())
