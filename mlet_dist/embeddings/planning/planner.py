"""TorchRec's planner with estimates for multi-layer tables, which are computed in ``table_cost``.

TorchRec's own estimators would assume that W1's k columns are exchanged. The estimators here take W2 and each table's
exchange into account, and reserve the memory that every rank needs wherever the rows are. Collections that are not
multi-layer are left to TorchRec's estimators.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, Proposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import Perf, ShardEstimator, ShardingOption, Storage, StorageReservation

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.planning.cost_model import (
    RESERVED_SHARE,
    Device,
    Memory,
    device_defaults,
    step_time,
    total_memory,
)
from mlet_dist.embeddings.planning.plan_cost import Ranks, load_factor, table_cost
from mlet_dist.embeddings.planning.plan_rating import FewTypesProposer, Groups, LatencyPerfModel
from mlet_dist.embeddings.planning.search_space import Constraints, PruningEnumerator, table_constraints
from mlet_dist.embeddings.planning.table_cost import TableCost
from mlet_dist.embeddings.sharded.placement import REPLICATED_BYTES
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

# Default float32 operations per second: those of an A100, and of a few CPU cores.
_FLOPS = {"cuda": 19.5e12, "cpu": 1e11}


def multi_layer_planner(
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    topology: Topology,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    *,
    dense_bytes: float = 0,
    device: Device | None = None,
    constraints: Constraints | None = None,
    replicated_bytes: float = REPLICATED_BYTES,
) -> EmbeddingShardingPlanner:
    """Build TorchRec's planner with the estimators of this module; proposers and partitioner are TorchRec's.

    Args:
        tables: the tables to plan.
        topology: ranks, memory and bandwidths.
        sharder: the sharder that will shard the model, with its pooling factors and local batch size.
        dense_bytes: memory of the layers other than tables, on every rank.
        device: hardware of a rank, for the predicted times and latencies; by default taken from ``topology``.
        constraints: TorchRec's constraints by table; ``table_constraints`` fills in what they leave open.
        replicated_bytes: the limit on a table's rows in bytes up to which it may be data_parallel.

    Raises:
        ValueError: the constraints cannot be met, or name an unknown table.
    """
    device = device or device_of(topology)
    groups = Groups(tables, topology, sharder, device.collectives)
    limited = table_constraints(tables, Ranks.of(topology), sharder, constraints, replicated_bytes)
    estimators = [
        MultiLayerPerfEstimator(topology, sharder, device, limited),
        MultiLayerStorageEstimator(topology, sharder, limited),
    ]
    # TorchRec's default proposers without the grid search, which tries up to 10,000 plans.
    proposers: list[Proposer] = [
        FewTypesProposer(),
        GreedyProposer(),
        GreedyProposer(use_depth=False),
        UniformProposer(),
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=sharder.local_batch_size,
        enumerator=PruningEnumerator(
            groups, 1e3 * device.launch, topology, sharder.local_batch_size, limited, estimators
        ),
        storage_reservation=ReplicatedStorageReservation(dense_bytes, sharder),
        proposer=proposers,
        performance_model=LatencyPerfModel(topology, groups),
        stats=NoopEmbeddingStats(),
        constraints=limited,
    )


class _Estimator(ShardEstimator):
    """Computes the cost of multi-layer tables; leaves other tables to TorchRec's estimator."""

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        torchrec_estimator: ShardEstimator,
    ) -> None:
        self._ranks, self._sharder, self._torchrec = Ranks.of(topology), sharder, torchrec_estimator

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Set the storage or the perf of every shard, in place."""
        others = []
        tables: dict[int, dict[str, MultiLayerEmbeddingBagConfig]] = {}
        for option in sharding_options:
            module = option.module[1]
            if not isinstance(module, MultiLayerTables):
                others.append(option)
                continue
            if id(module) not in tables:
                tables[id(module)] = {table.name: table for table in module.row_tables()}
            cost = table_cost(
                tables[id(module)][option.name],
                option.tensor,
                self._sharder,
                self._ranks,
                option.sharding_type,
                option.compute_kernel,
                load_factor(option.cache_params),
            )
            self._fill(option, cost)
        if others:
            self._torchrec.estimate(others, sharder_data_map)

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        raise NotImplementedError


class MultiLayerStorageEstimator(_Estimator):
    """Estimates the bytes of each shard: rows, their optimizer state and a step's buffers, on device and host.

    Memory that every rank needs wherever the rows are is handled by ``ReplicatedStorageReservation``.

    Args:
        topology: ranks and their memory.
        sharder: the sharder, for exchanges and batch sizes.
        constraints: passed to TorchRec's estimator for tables that are left to it.
    """

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(topology, sharder, EmbeddingStorageEstimator(topology=topology, constraints=constraints))

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        by_rows: dict[int, Storage] = {}  # most of a thousand shards have equal numbers of rows
        for shard in option.shards:
            rows = shard.size[0] if cost.exchange is not None else option.tensor.shape[0]
            if rows not in by_rows:
                memory = cost.owner_memory(rows)
                device, host = round(memory.total), round(memory.host)
                by_rows[rows] = Storage(hbm=0, ddr=device) if self._ranks.on_cpu else Storage(hbm=device, ddr=host)
            shard.storage = by_rows[rows]


class MultiLayerPerfEstimator(_Estimator):
    """Estimates the milliseconds of each shard by ``step_time``; a table's owner ranks share its work evenly.

    Args:
        topology: ranks, and their bandwidths if no device is given.
        sharder: the sharder, for exchanges and batch sizes.
        device: hardware of a rank.
        constraints: passed to TorchRec's estimator for tables that are left to it.
    """

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        device: Device | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(topology, sharder, EmbeddingPerfEstimator(topology=topology, constraints=constraints))
        self._device = device or device_of(topology)

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        time = step_time(cost.owner_step(), self._device)
        on_device, sending = 1e3 * (time.memory + time.host + time.compute), 1e3 * time.network
        # Backward computes two gradients, those of rows and of W2, and sends as much as forward.
        perf = Perf(
            fwd_compute=on_device / 3, fwd_comms=sending / 2, bwd_compute=on_device * 2 / 3, bwd_comms=sending / 2
        )
        for shard in option.shards:
            shard.perf = perf


class ReplicatedStorageReservation(StorageReservation):
    """Reserves the memory that every rank needs wherever the rows are, and ``RESERVED_SHARE`` of all memory.

    Args:
        dense_bytes: memory of the layers other than tables, with gradients, optimizer state and activations. W2 and the
            vectors of a rank's batch are added from the model.
        sharder: the sharder of the tables.
    """

    def __init__(self, dense_bytes: float, sharder: MultiLayerEmbeddingBagCollectionSharder) -> None:
        self._dense_bytes, self._sharder = dense_bytes, sharder
        self._percentage = RESERVED_SHARE
        self._reserved: Topology | None = None

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: Any,
        constraints: Constraints | None = None,
    ) -> Topology:
        """Return a topology with the memory that remains for tables."""
        taken = self._dense_bytes
        for each in module.modules():
            if isinstance(each, MultiLayerTables):
                taken += requester_memory(each, self._sharder, Ranks.of(topology)).total
        self._reserved = copy.deepcopy(topology)
        for device in self._reserved.devices:
            storage = device.storage
            if topology.compute_device == "cpu":
                storage.ddr = int(storage.ddr * (1 - RESERVED_SHARE) - taken)
            else:
                storage.hbm = int(storage.hbm * (1 - RESERVED_SHARE) - taken)
                storage.ddr = int(storage.ddr * (1 - RESERVED_SHARE))
        return self._reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        return copy.deepcopy(self._reserved)


def requester_memory(
    module: MultiLayerTables, sharder: MultiLayerEmbeddingBagCollectionSharder, ranks: Ranks
) -> Memory:
    """Return the memory of W2 and of a batch's vectors, which every rank needs wherever the rows are."""
    return total_memory(
        table_cost(table, module.row_weight(table.name), sharder, ranks).requester_memory()
        for table in module.row_tables()
    )


def device_of(topology: Topology) -> Device:
    """Convert TorchRec's bandwidths, in bytes per millisecond, and the memory of the first rank to a Device."""
    kind = topology.compute_device
    storage = topology.devices[0].storage
    on_cpu = kind == "cpu"
    return Device(
        name=kind,
        kind=kind,
        memory=storage.ddr if on_cpu else storage.hbm,
        memory_bandwidth=1e3 * (topology.ddr_mem_bw if on_cpu else topology.hbm_mem_bw),
        flops=_FLOPS[kind],
        node_bandwidth=1e3 * topology.intra_host_bw,
        network_bandwidth=1e3 * topology.inter_host_bw,
        host_memory=0 if on_cpu else storage.ddr,
        host_bandwidth=0 if on_cpu else 1e3 * topology.hbm_to_ddr_mem_bw,
        **device_defaults(kind),
    )
