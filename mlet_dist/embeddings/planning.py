"""TorchRec's planner with estimates that are true for multi-layer tables; the numbers themselves are in ``costs.py``.

TorchRec's own estimators see W1's k columns and let them cross the network. These know of W2, of each table's exchange
and of what every rank holds besides. Sharding types that they do not know are left to TorchRec's.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    ShardEstimator,
    ShardingOption,
    Storage,
    StorageReservation,
)
from torchrec.distributed.types import ParameterSharding, ShardingType

from mlet_dist.embeddings.costs import (
    RESERVED_SHARE,
    Device,
    Optimizer,
    TableCost,
    rows_of_rank,
    step_time,
)
from mlet_dist.embeddings.multi_layer import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharder import MultiLayerEmbeddingBagCollectionSharder

_KNOWN = (ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value)
# Of fbgemm's optimizers, by the name of the class that apply_optimizer_in_backward was given.
_OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": "sgd",
    "Adagrad": "adagrad",
    "RowWiseAdagrad": "rowwise_adagrad",
    "Adam": "adam",
}
# float32 operations a second, where nobody says: an A100's and a few cores'.
_FLOPS = {"cuda": 19.5e12, "cpu": 1e11}

Constraints = dict[str, ParameterConstraints]


class _Estimator(ShardEstimator):
    """Finds a table's cost; hands sharding types that it does not know to TorchRec's estimator."""

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        torchrec_estimator: ShardEstimator,
    ) -> None:
        self._topology, self._sharder, self._torchrec = topology, sharder, torchrec_estimator

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Fill in storage or perf of every shard, in place."""
        others = []
        for option in sharding_options:
            module = option.module[1]
            if isinstance(module, MultiLayerEmbeddingBagCollection) and option.sharding_type in _KNOWN:
                table = next(each for each in module.embedding_bag_configs() if each.name == option.name)
                replicated = option.sharding_type == ShardingType.DATA_PARALLEL.value
                self._fill(option, self._cost(table, option.tensor, replicated))
            else:
                others.append(option)
        if others:
            self._torchrec.estimate(others, sharder_data_map)

    def _cost(self, table: MultiLayerEmbeddingBagConfig, rows: torch.Tensor, replicated: bool) -> TableCost:
        on_cpu = self._topology.compute_device == "cpu"
        return table_cost(table, rows, self._sharder, self._topology.world_size, on_cpu=on_cpu, replicated=replicated)

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        raise NotImplementedError


class MultiLayerStorageEstimator(_Estimator):
    """Bytes of each shard: rows, their optimizer's state and the buffers of a step; W2 is reserved on every rank.

    Args:
        topology: ranks and their memory.
        sharder: knows exchanges and batches.
        constraints: for sharding types that are left to TorchRec's estimator.
    """

    def __init__(
        self,
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(topology, sharder, EmbeddingStorageEstimator(topology=topology, constraints=constraints))

    def _fill(self, option: ShardingOption, cost: TableCost) -> None:
        on_cpu = self._topology.compute_device == "cpu"
        for shard in option.shards:
            memory = cost.memory(option.tensor.shape[0] if cost.way == "replicated" else shard.size[0])
            bytes_held = round(memory.weights + memory.optimizer + memory.buffers)
            shard.storage = Storage(hbm=0 if on_cpu else bytes_held, ddr=bytes_held if on_cpu else 0)


class MultiLayerPerfEstimator(_Estimator):
    """Milliseconds of each shard by ``step_time``; a table's ranks share its work evenly.

    Args:
        topology: ranks, and bandwidths where no device is given.
        sharder: knows exchanges and batches.
        device: hardware of a rank.
        constraints: for sharding types that are left to TorchRec's estimator.
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
        time = step_time(cost.step(), self._device, self._topology.world_size, self._topology.local_world_size)
        on_device, sending = 1e3 * (time.memory + time.compute), 1e3 * time.network
        for shard in option.shards:
            # Backward computes two gradients, of rows and of W2, and sends what forward sent.
            shard.perf = Perf(
                fwd_compute=on_device / 3, fwd_comms=sending / 2, bwd_compute=on_device * 2 / 3, bwd_comms=sending / 2
            )


class ReplicatedStorageReservation(StorageReservation):
    """Keeps free on every rank what is replicated, and ``RESERVED_SHARE`` of the memory.

    Args:
        dense_bytes: the layers beside the tables, with gradients, state and activations. W2 is added from the model.
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
        on_cpu = topology.compute_device == "cpu"
        taken = self._dense_bytes
        for each in module.modules():
            if isinstance(each, MultiLayerEmbeddingBagCollection):
                for table in each.embedding_bag_configs():
                    rows = each.embedding_bags[table.name].weight
                    cost = table_cost(table, rows, self._sharder, topology.world_size, on_cpu=on_cpu)
                    taken += cost.projection_bytes()
        self._reserved = copy.deepcopy(topology)
        for device in self._reserved.devices:
            if on_cpu:
                device.storage.ddr = int(device.storage.ddr * (1 - RESERVED_SHARE) - taken)
            else:
                device.storage.hbm = int(device.storage.hbm * (1 - RESERVED_SHARE) - taken)
        return self._reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        return copy.deepcopy(self._reserved)


def multi_layer_planner(
    topology: Topology,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    *,
    dense_bytes: float = 0,
    device: Device | None = None,
    constraints: Constraints | None = None,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner with the estimates of this module; its proposers and partitioner stay.

    Args:
        topology: ranks, memory and bandwidths.
        sharder: the one that will shard; give it the pooling factors and the local batch.
        dense_bytes: of the layers beside the tables, on every rank.
        device: hardware of a rank, for predicted times.
        constraints: TorchRec's, by table.
    """
    estimators = [
        MultiLayerPerfEstimator(topology, sharder, device, constraints),
        MultiLayerStorageEstimator(topology, sharder, constraints),
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=sharder.local_batch_size,
        enumerator=EmbeddingEnumerator(topology, sharder.local_batch_size, constraints, estimators),
        storage_reservation=ReplicatedStorageReservation(dense_bytes, sharder),
        stats=NoopEmbeddingStats(),
        constraints=constraints,
    )


def table_cost(
    table: MultiLayerEmbeddingBagConfig,
    rows: torch.Tensor,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    world_size: int,
    *,
    on_cpu: bool,
    replicated: bool = False,
) -> TableCost:
    """The cost of a table that is row_wise, or replicated where it is so small that a rank would hold no row.

    Args:
        rows: W1, on any device, which knows its optimizer (``apply_optimizer_in_backward``).
    """
    traffic = sharder.traffic(table)
    small = rows_of_rank(table.num_embeddings, table.row_width, world_size, on_cpu=on_cpu) is None
    return TableCost(
        name=table.name,
        row_width=table.row_width,
        projected=table.hidden_dim is not None,
        traffic=traffic,
        optimizer=optimizer_of(rows),
        way="replicated" if replicated or small else sharder.choose(table, ShardingType.ROW_WISE.value, world_size)[0],
        world_size=world_size,
        on_cpu=on_cpu,
    )


def table_costs(
    module: MultiLayerEmbeddingBagCollection,
    params: dict[str, ParameterSharding],
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    world_size: int,
    *,
    on_cpu: bool,
) -> dict[str, tuple[TableCost, list[int]]]:
    """Each table's cost and its rows by rank, in a plan that ``sharder.settle`` has settled."""
    found = {}
    for table in module.embedding_bag_configs():
        spec = params[table.name].sharding_spec
        rows = [table.num_embeddings if spec is None else 0] * world_size
        for shard in [] if spec is None else spec.shards:
            rows[shard.placement.rank()] += shard.shard_sizes[0]
        weight = module.embedding_bags[table.name].weight
        found[table.name] = (
            table_cost(table, weight, sharder, world_size, on_cpu=on_cpu, replicated=spec is None),
            rows,
        )
    return found


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


def device_of(topology: Topology) -> Device:
    """TorchRec's bandwidths, which are bytes a millisecond, and memory of the first rank."""
    kind = topology.compute_device
    storage = topology.devices[0].storage
    return Device(
        name=kind,
        kind=kind,
        memory=storage.ddr if kind == "cpu" else storage.hbm,
        memory_bandwidth=1e3 * (topology.ddr_mem_bw if kind == "cpu" else topology.hbm_mem_bw),
        flops=_FLOPS[kind],
        node_bandwidth=1e3 * topology.intra_host_bw,
        network_bandwidth=1e3 * topology.inter_host_bw,
    )
