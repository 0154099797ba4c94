"""The cost of a complete plan: of each table as it is sharded, and of a rank with all tables and the dense layers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import CacheParams, ParameterSharding
from torchrec.modules.embedding_configs import DataType, PoolingType

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.planning.cost_model import (
    FLOAT,
    RESERVED_SHARE,
    Device,
    Memory,
    Optimizer,
    Step,
    StepTime,
    gigabytes,
    step_time,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.planning.dense_cost import DenseCost
from mlet_dist.embeddings.planning.step_collectives import latency
from mlet_dist.embeddings.planning.table_cost import (
    CACHE_LOAD_FACTOR,
    DATA_PARALLEL,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    TableCost,
)
from mlet_dist.embeddings.sharded.collectives import codecs_of, forward_backward_bytes
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import max_rows_per_rank
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.sharded.slot_map import BYTES_PER_ROW
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

# By the name of the class that was passed to apply_optimizer_in_backward.
_OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": "sgd",
    "Adagrad": "adagrad",
    "RowWiseAdagrad": "rowwise_adagrad",
    "Adam": "adam",
}

Tables = Mapping[str, tuple[TableCost, Sequence[int]]]
"""The cost of each table, and its number of rows on each rank."""


@dataclass(frozen=True)
class Ranks:
    """The number of ranks R, that of ranks per node L, and whether they compute on a CPU."""

    world_size: int
    local_world_size: int
    on_cpu: bool

    @classmethod
    def of(cls, topology: Topology) -> "Ranks":
        """Return the ranks of TorchRec's topology. A pod counts as a node, because its ranks have fast links."""
        return cls(topology.world_size, topology.intra_group_size, topology.compute_device == "cpu")

    def num_owners(self, sharding_type: str) -> int:
        """Return H, the number of ranks over which a table is split."""
        return {TABLE_WISE: 1, TABLE_ROW_WISE: self.local_world_size}.get(sharding_type, self.world_size)


def has_enough_rows(table: MultiLayerEmbeddingBagConfig, sharding_type: str, ranks: Ranks) -> bool:
    """Return False if the sharder would replace a sharding by blocks by data_parallel because of too few rows."""
    if sharding_type not in (ROW_WISE, TABLE_ROW_WISE):
        return True
    if table.segments and not ranks.on_cpu:
        return True
    blocks = ranks.num_owners(sharding_type)
    return max_rows_per_rank(table.num_embeddings, table.row_width, blocks, on_cpu=ranks.on_cpu) is not None


def table_cost(
    table: MultiLayerEmbeddingBagConfig,
    rows: torch.Tensor,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
    sharding_type: str = ROW_WISE,
    kernel: str = EmbeddingComputeKernel.FUSED.value,
    cache_load_factor: float = CACHE_LOAD_FACTOR,
) -> TableCost:
    """Return the cost of a table under a sharding type, or under data_parallel if the sharder would replace it.

    Args:
        table: the table's config.
        rows: W1 on any device, with the optimizer that ``apply_optimizer_in_backward`` set.
        sharder: the sharder, for the exchange and the batch.
        ranks: the ranks.
        sharding_type: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        cache_load_factor: the share of rows in the cache of fused_uvm_caching.
    """
    if not has_enough_rows(table, sharding_type, ranks):
        sharding_type = DATA_PARALLEL
    replicated = sharding_type == DATA_PARALLEL
    exchange = None
    if not replicated:
        exchange, _ = sharder.exchange_for(table, sharding_type, ranks.world_size, on_cpu=ranks.on_cpu)
    value_bytes = FLOAT, FLOAT
    if exchange is not None and ranks.world_size > 1:
        operation = COMM_OPS["all_to_all" if sharding_type == TABLE_WISE else exchange]
        value_bytes = forward_backward_bytes(codecs_of(sharder.qcomm_codecs_registry, operation))
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
        # The sharded module keeps replicated rows in float32.
        row_bytes=2 if table.data_type == DataType.FP16 and not replicated else FLOAT,
        value_bytes=value_bytes,
        on_cpu=ranks.on_cpu,
        num_projections=max(1, len(table.segments)),
        pooled=bool(table.segments),
        slot_map_bytes=BYTES_PER_ROW * table.moving_rows,
        sequences=table.pooling == PoolingType.NONE,
    )


def table_costs(
    module: MultiLayerTables,
    params: dict[str, ParameterSharding],
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
) -> dict[str, tuple[TableCost, list[int]]]:
    """Return the cost of each table and its rows by rank, in a plan after ``sharder.finalize_plan``."""
    found = {}
    for table in module.row_tables():
        sharding = params[table.name]
        spec = sharding.sharding_spec
        rows = [table.num_embeddings if spec is None else 0] * ranks.world_size
        for shard in [] if spec is None else spec.shards:
            rows[shard.placement.rank()] += shard.shard_sizes[0]
        cost = table_cost(
            table,
            module.row_weight(table.name),
            sharder,
            ranks,
            sharding.sharding_type,
            sharding.compute_kernel,
            load_factor(sharding.cache_params),
        )
        found[table.name] = (cost, rows)
    return found


def load_factor(cache: CacheParams | None) -> float:
    """Return the share of rows in a cache, by default fbgemm's."""
    return CACHE_LOAD_FACTOR if cache is None or cache.load_factor is None else cache.load_factor


def optimizer_of(rows: torch.Tensor) -> Optimizer:
    """Return the optimizer that ``apply_optimizer_in_backward`` set on W1, or sgd if there is none.

    Raises:
        ValueError: the optimizer is not one of those whose state size is known.
    """
    kinds: list[Callable[..., Any]] = getattr(rows, "_optimizer_classes", [])
    if not kinds:
        return "sgd"
    name = getattr(kinds[0], "__name__", str(kinds[0]))
    if name not in _OPTIMIZERS:
        raise ValueError(
            f"optimizer {name} of the rows: the size of its state is unknown; use one of {', '.join(_OPTIMIZERS)}"
        )
    return _OPTIMIZERS[name]


def memory_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Memory:
    """Return the memory of one rank for all tables and dense layers."""
    of_tables = total_memory(cost.memory(rows[rank]) for cost, rows in tables.values())
    return of_tables + dense.memory(of_tables.gradients)


def step_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Step:
    """Return the work of one rank in a step."""
    of_tables = (cost.step(owns_rows=_owns_rows(cost, rows[rank])) for cost, rows in tables.values())
    return total_step([*of_tables, dense.step()])


def slowest_step(tables: Tables, dense: DenseCost, device: Device, busiest: float = 1.0) -> tuple[Step, StepTime]:
    """Return the work and the time of the rank that takes longest.

    Args:
        tables: cost and rows of each table.
        dense: cost of the dense layers.
        device: hardware of a rank.
        busiest: the work of the busiest owner of unique rows over that of an average one; 1 if owners are even, or if
            it is not known.
    """
    groups = [cost.group for cost, _ in tables.values()]
    waiting = latency(groups, dense.world_size, dense.local_world_size, device.collectives)
    host_work = device.host_step + len(tables) * device.host_table
    uneven = total_step(cost.owner_step() for cost, _ in tables.values() if cost.exchange == "unique_rows")
    found = []
    for rank, *_ in group_identical_ranks(tables):
        step = step_of_rank(tables, dense, rank)
        time = step_time(step, device)
        skew = step_time(step + uneven.times(busiest - 1), device).total - time.total if busiest > 1 else 0.0
        floor = host_work if device.kind == "cpu" else max(0.0, host_work - time.total - waiting - skew)
        found.append((step, dataclasses.replace(time, latency=waiting, floor=floor, skew=skew)))
    return max(found, key=lambda each: each[1].total)


def fullest_memory(tables: Tables, dense: DenseCost) -> Memory:
    """Return the memory of the rank with the fullest device; ``host`` is the maximum over all ranks."""
    memories = [memory_of_rank(tables, dense, rank) for rank, *_ in group_identical_ranks(tables)]
    fullest = max(memories, key=lambda each: each.total)
    return dataclasses.replace(fullest, host=max(each.host for each in memories))


def shortage(tables: Tables, dense: DenseCost, memory: float, host_memory: float = 0) -> str:
    """Describe which rank lacks how much memory, on the device or else on its host, and its largest table."""
    memories = {rank: memory_of_rank(tables, dense, rank) for rank, *_ in group_identical_ranks(tables)}
    rank = max(memories, key=lambda each: memories[each].total)
    needed, given, where = memories[rank].total, memory, ""
    if needed <= given * (1 - RESERVED_SHARE):
        host_rank = max(memories, key=lambda each: memories[each].host)
        if memories[host_rank].host > host_memory * (1 - RESERVED_SHARE):
            rank, needed, given, where = host_rank, memories[host_rank].host, host_memory, " on its host"
    usable = given * (1 - RESERVED_SHARE)

    def of_table(name: str) -> float:
        cost, rows = tables[name]
        of_rank = cost.memory(rows[rank])
        return of_rank.host if where else of_rank.total

    name = max(tables, key=of_table)
    cost, rows = tables[name]
    return (
        f"rank {rank} needs {gigabytes(needed)}{where}, but only {gigabytes(usable)} of {gigabytes(given)} are usable, "
        f"{gigabytes(needed - usable)} short; its largest table is {name!r}: {rows[rank]:,} rows of {cost.row_width} "
        f"columns, {gigabytes(of_table(name))}"
    )


def _owns_rows(cost: TableCost, rows: int) -> bool:
    return rows > 0 or cost.num_owners == cost.world_size


def group_identical_ranks(tables: Tables) -> list[list[int]]:
    """Group the ranks that own equal numbers of rows of every table."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, owned in enumerate(zip(*(rows for _, rows in tables.values()), strict=True)):
        found.setdefault(owned, []).append(rank)
    return list(found.values())
