"""From a DLRM whose tables are on the meta device to TorchRec's DistributedModelParallel."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import QuantizedCommCodecs, ShardingPlan
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.codecs import codecs_of
from mlet_dist.embeddings.costs import Device, Memory, TableCost, shortage
from mlet_dist.embeddings.exchange import COMM_OPS, ExchangeChoice
from mlet_dist.embeddings.planning import multi_layer_planner, optimizer_of, table_cost, table_costs
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX, dense_cost
from mlet_dist.training.distributed import Worker

_REPLICATED = "too few rows for a share on every rank"
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class ModelPlan:
    """TorchRec's plan as it will run, and what it costs.

    Attributes:
        plan: for DistributedModelParallel.
        sharder: with which it was made.
        tables: each table's cost and its rows by rank.
        dense: bytes of the layers beside the tables.
    """

    plan: ShardingPlan
    sharder: MultiLayerEmbeddingBagCollectionSharder
    tables: dict[str, tuple[TableCost, list[int]]]
    dense: Memory

    def entries(self) -> list[dict[str, Any]]:
        """A record a table: sharding type, exchange, reason and rows by rank."""
        params = self.plan.plan[TABLES_PREFIX.rstrip(".")]
        return [
            {
                "table": name,
                "sharding_type": params[name].sharding_type,
                "compute_kernel": params[name].compute_kernel,
                "exchange": self.sharder.chosen[name][0] if name in self.sharder.chosen else None,
                "reason": self.sharder.chosen[name][1] if name in self.sharder.chosen else _REPLICATED,
                "rows_per_rank": rows,
            }
            for name, (_, rows) in self.tables.items()
        ]


def plan_model(
    model: DLRM,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    topology: Topology,
    device: Device | None = None,
) -> ModelPlan:
    """Plan with TorchRec's planner and the estimates of ``embeddings.planning``; in one process, without a group.

    Args:
        model: tables on the meta device, whose rows know their optimizer.
        device: hardware of a rank; None takes the topology's.

    Raises:
        UserError: the planner finds no plan that fits; it says which table and how much is missing.
    """
    tables = model.sparse_arch.embedding_bag_collection
    world_size, on_cpu = topology.world_size, topology.compute_device == "cpu"
    optimizer = optimizer_of(next(iter(tables.embedding_bags.values())).weight)
    buffers = sum(
        table_cost(table, tables.embedding_bags[table.name].weight, sharder, world_size, on_cpu=on_cpu).buffer_bytes()
        for table in tables.embedding_bag_configs()
    )
    dense = dense_cost(model, sharder.local_batch_size, optimizer, world_size).memory(buffers)

    def settled(plan: ShardingPlan) -> ModelPlan:
        params = plan.plan[TABLES_PREFIX.rstrip(".")]
        sharder.settle(tables, params, world_size, on_cpu=on_cpu)
        return ModelPlan(plan, sharder, table_costs(tables, params, sharder, world_size, on_cpu=on_cpu), dense)

    try:
        planner = multi_layer_planner(topology, sharder, dense_bytes=dense.total, device=device)
        return settled(planner.plan(model, [sharder]))
    except PlannerError:
        storage = topology.devices[0].storage
        unlimited = Topology(
            world_size,
            topology.compute_device,
            hbm_cap=_UNLIMITED,
            ddr_cap=_UNLIMITED,
            local_world_size=topology.local_world_size,
        )
        found = settled(multi_layer_planner(unlimited, sharder).plan(model, [sharder]))
        missing = shortage(found.tables, dense, storage.ddr if on_cpu else storage.hbm)
        where = "one rank" if world_size == 1 else f"{world_size:,} ranks"
        raise UserError(f"the tables do not fit {where} on {topology.compute_device}: {missing}") from None


def shard_model(
    model: DLRM,
    worker: Worker,
    local_batch_size: int,
    exchange: ExchangeChoice = "auto",
    codecs: dict[str, QuantizedCommCodecs] | None = None,
    pooling_factors: Mapping[str, float] | None = None,
) -> tuple[DistributedModelParallel, ModelPlan]:
    """Plan, shard every W1 row-wise and wrap what is replicated in DDP. A collective call.

    Args:
        local_batch_size: rows of a batch on one rank, by which ``auto`` chooses.
        exchange: ``sharding.exchange`` of the config.
        codecs: what vectors and their gradients are rounded to on the network (``embeddings/codecs.py``).
        pooling_factors: ids a bag of each table, on average, by which ``auto`` chooses too; 1 where none is given.

    Raises:
        UserError: no plan fits the memory of the device; on every rank.
    """
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        exchange=exchange,
        pooling_factors=pooling_factors,
        local_batch_size=local_batch_size,
        qcomm_codecs_registry=codecs,
    )
    on_cuda = worker.device.type == "cuda"
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
        # TorchRec's defaults are those of one kind of host: 32 GB a GPU, 128 GB a rank.
        hbm_cap=torch.cuda.get_device_properties(worker.device).total_memory if on_cuda else None,
        ddr_cap=_host_memory() // worker.local_world_size,
    )
    planned = _plan_on_first(model, sharder, topology, worker)
    sharded = DistributedModelParallel(model, device=worker.device, plan=planned.plan, sharders=[sharder])
    return sharded, planned


def _plan_on_first(
    model: DLRM, sharder: MultiLayerEmbeddingBagCollectionSharder, topology: Topology, worker: Worker
) -> ModelPlan:
    """The first rank plans, by its own memory; what it finds, or why there is none, is every rank's."""
    found: list[Any] = [None, None]
    if worker.is_first:
        try:
            planned = plan_model(model, sharder, topology)
            found = [(planned.plan, planned.tables, planned.dense, sharder.chosen), None]
        except UserError as error:
            found = [None, str(error)]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    plan, tables, dense, sharder.chosen = found[0]
    return ModelPlan(plan, sharder, tables, dense)


def describe_plan(planned: ModelPlan) -> list[str]:
    """A line for each way in which tables are kept, with the reason for the largest."""
    sizes = {name: cost.traffic.num_embeddings for name, (cost, _) in planned.tables.items()}
    lines = _describe(sizes, planned.sharder.chosen)
    codecs = planned.sharder.qcomm_codecs_registry
    if codecs and planned.sharder.chosen:
        lines.append(_describe_codecs(codecs_of(codecs, COMM_OPS["unique_rows"])))
    kernels = {entry["compute_kernel"] for entry in planned.entries()}
    if kernels == {EmbeddingComputeKernel.DENSE.value} and planned.sharder.chosen:
        lines.append("all rows leave a dense gradient: fbgemm has this optimizer's fused kernel for CUDA alone")
    return lines


def _describe(sizes: Mapping[str, int], chosen: Mapping[str, tuple[str, str]]) -> list[str]:
    ways: dict[str, list[str]] = {}
    for table in sizes:
        way = f"row_wise, {chosen[table][0]}" if table in chosen else "data_parallel"
        ways.setdefault(way, []).append(table)
    lines = []
    for way, tables in ways.items():
        largest = max(tables, key=lambda table: sizes[table])
        reason = chosen[largest][1] if largest in chosen else _REPLICATED
        others = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        lines.append(f"{way}: {largest} ({sizes[largest]:,} rows){others}; {reason}")
    return lines


def _describe_codecs(codecs: QuantizedCommCodecs) -> str:
    forward, backward = (
        str(codec.quantized_dtype).removeprefix("torch.") for codec in (codecs.forward, codecs.backward)
    )
    return f"vectors cross the network as {forward}, their gradients as {backward}"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
