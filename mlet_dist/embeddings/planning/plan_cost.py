"""The costs of tables as a plan has them: from TorchRec's words to ``TableCost``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import CacheParams, ParameterSharding
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.cost_model import FLOAT, Optimizer, rows_of_rank
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
