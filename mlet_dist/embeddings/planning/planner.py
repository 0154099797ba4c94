"""TorchRec's planner with estimates that are true for multi-layer tables; the numbers are in ``table_cost.py``.

TorchRec's own estimators see W1's k columns and let them cross the network. These know of W2, of each table's exchange
and of what every rank holds besides. Collections that are not multi-layer are left to TorchRec's.
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

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.cost_model import RESERVED_SHARE, Device, Memory, step_time, total_memory
from mlet_dist.embeddings.planning.plan_cost import Ranks, load_factor, table_cost
from mlet_dist.embeddings.planning.search_space import Constraints, WorthwhileEnumerator, table_constraints
from mlet_dist.embeddings.planning.table_cost import TableCost
from mlet_dist.embeddings.sharded.placement import REPLICATED_BYTES
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder

# float32 operations a second, where nobody says: an A100's and a few cores'.
_FLOPS = {"cuda": 19.5e12, "cpu": 1e11}


class _Estimator(ShardEstimator):
    """Finds a table's cost; hands tables that are not multi-layer to TorchRec's estimator."""

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        torchrec_estimator: ShardEstimator,
    ) -> None:
        self._ranks, self._sharder, self._torchrec = Ranks.of(topology), sharder, torchrec_estimator

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Fill in storage or perf of every shard, in place."""
        others = []
        tables: dict[int, dict[str, MultiLayerEmbeddingBagConfig]] = {}
        for option in sharding_options:
            module = option.module[1]
            if not isinstance(module, MultiLayerEmbeddingBagCollection):
                others.append(option)
                continue
            if id(module) not in tables:
                tables[id(module)] = {table.name: table for table in module.embedding_bag_configs()}
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
    """Bytes of each shard: rows, their optimizer's state and the buffers of a step, on the device and on its host.

    What every rank holds, wherever rows are, is reserved (``ReplicatedStorageReservation``).

    Args:
        topology: ranks and their memory.
        sharder: knows exchanges and batches.
        constraints: for tables that are left to TorchRec's estimator.
    """

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(topology, sharder, EmbeddingStorageEstimator(topology=topology, constraints=constraints))

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        by_rows: dict[int, Storage] = {}  # of a thousand shards most are alike
        for shard in option.shards:
            rows = shard.size[0] if cost.exchange is not None else option.tensor.shape[0]
            if rows not in by_rows:
                memory = cost.held_memory(rows)
                device, host = round(memory.total), round(memory.host)
                by_rows[rows] = Storage(hbm=0, ddr=device) if self._ranks.on_cpu else Storage(hbm=device, ddr=host)
            shard.storage = by_rows[rows]


class MultiLayerPerfEstimator(_Estimator):
    """Milliseconds of each shard by ``step_time``; the ranks that hold a table share its work evenly.

    Args:
        topology: ranks, and bandwidths where no device is given.
        sharder: knows exchanges and batches.
        device: hardware of a rank.
        constraints: for tables that are left to TorchRec's estimator.
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
        time = step_time(cost.held_step(), self._device)
        on_device, sending = 1e3 * (time.memory + time.host + time.compute), 1e3 * time.network
        # Backward computes two gradients, of rows and of W2, and sends what forward sent.
        perf = Perf(
            fwd_compute=on_device / 3, fwd_comms=sending / 2, bwd_compute=on_device * 2 / 3, bwd_comms=sending / 2
        )
        for shard in option.shards:
            shard.perf = perf


class ReplicatedStorageReservation(StorageReservation):
    """Keeps free on every rank what does not depend on where rows are, and ``RESERVED_SHARE`` of the memory.

    Args:
        dense_bytes: the layers beside the tables, with gradients, state and activations. W2 and the vectors of a rank's
            batch are added from the model.
        sharder: of the tables.
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
        """A topology with as much memory as is left for tables."""
        taken = self._dense_bytes
        for each in module.modules():
            if isinstance(each, MultiLayerEmbeddingBagCollection):
                taken += home_memory(each, self._sharder, Ranks.of(topology)).total
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
    """TorchRec's planner with the estimates of this module; its proposers and partitioner stay.

    Args:
        tables: those that will be planned.
        topology: ranks, memory and bandwidths.
        sharder: the one that will shard; give it the pooling factors and the local batch.
        dense_bytes: of the layers beside the tables, on every rank.
        device: hardware of a rank, for predicted times.
        constraints: TorchRec's, by table; where they say nothing, ``table_constraints`` does.
        replicated_bytes: of a table's rows, up to which it may be data_parallel.

    Raises:
        ValueError: the constraints cannot be met, or name a table that is not there.
    """
    limited = table_constraints(tables, Ranks.of(topology), sharder, constraints, replicated_bytes)
    estimators = [
        MultiLayerPerfEstimator(topology, sharder, device, limited),
        MultiLayerStorageEstimator(topology, sharder, limited),
    ]
    # TorchRec's default, but its grid search, which tries up to 10,000 plans.
    proposers: list[Proposer] = [GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=sharder.local_batch_size,
        enumerator=WorthwhileEnumerator(topology, sharder.local_batch_size, limited, estimators),
        storage_reservation=ReplicatedStorageReservation(dense_bytes, sharder),
        proposer=proposers,
        stats=NoopEmbeddingStats(),
        constraints=limited,
    )


def home_memory(
    module: MultiLayerEmbeddingBagCollection, sharder: MultiLayerEmbeddingBagCollectionSharder, ranks: Ranks
) -> Memory:
    """What every rank holds for W2 and for the vectors of its batch, wherever rows are."""
    return total_memory(
        table_cost(table, module.embedding_bags[table.name].weight, sharder, ranks).home_memory()
        for table in module.embedding_bag_configs()
    )


def device_of(topology: Topology) -> Device:
    """TorchRec's bandwidths, which are bytes a millisecond, and memory of the first rank."""
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
    )
