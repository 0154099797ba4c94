"""From a DLRM whose tables are on the meta device to TorchRec's DistributedModelParallel."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import intra_and_cross_node_pg
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingType
from torchrec.models.dlrm import DLRM

from mlet_dist.config.sections import ShardingConfig
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.cost_model import Device
from mlet_dist.embeddings.sharded.collectives import exchange_codecs
from mlet_dist.errors import UserError
from mlet_dist.training.model_plan import ModelPlan, plan_model
from mlet_dist.training.process_group import Worker

_AS_BY_DEFAULT = ShardingConfig()


@dataclass(frozen=True)
class Sharding:
    """What a config asks, in TorchRec's words.

    Attributes:
        sharder: with exchanges, codecs and what is known of batches.
        constraints: of each table, for the planner.
        replicated_bytes: of a table's rows, up to which it may be data_parallel.
    """

    sharder: MultiLayerEmbeddingBagCollectionSharder
    constraints: dict[str, ParameterConstraints]
    replicated_bytes: float

    @classmethod
    def of(
        cls,
        config: ShardingConfig,
        model: DLRM,
        local_batch_size: int,
        pooling_factors: Mapping[str, float] | None = None,
    ) -> "Sharding":
        """From the ``sharding`` section, for the tables of ``model``."""
        names = [table.name for table in model.sparse_arch.embedding_bag_collection.embedding_bag_configs()]
        asked = {name: config.of_table(name) for name in names}
        exchanges = {name: own.exchange for name, own in asked.items() if own.exchange is not None}
        sharder = MultiLayerEmbeddingBagCollectionSharder(
            exchange=exchanges,
            pooling_factors=pooling_factors,
            local_batch_size=local_batch_size,
            qcomm_codecs_registry=exchange_codecs(config.forward_comm, config.backward_comm, local_batch_size),
        )
        constraints = {
            name: ParameterConstraints(
                sharding_types=None if own.sharding_types is None else list(own.sharding_types),
                compute_kernels=list(own.compute_kernels or ()),
                cache_params=CacheParams(load_factor=own.cache_load_factor),
            )
            for name, own in asked.items()
        }
        return cls(sharder, constraints, config.data_parallel_up_to_mb * 1e6)

    def plan(self, model: DLRM, topology: Topology, device: Device | None = None) -> ModelPlan:
        """As ``plan_model``."""
        return plan_model(model, self.sharder, topology, device, self.constraints, self.replicated_bytes)


def shard_model(
    model: DLRM,
    worker: Worker,
    local_batch_size: int,
    config: ShardingConfig = _AS_BY_DEFAULT,
    pooling_factors: Mapping[str, float] | None = None,
) -> tuple[DistributedModelParallel, ModelPlan]:
    """Plan, shard every W1 and wrap what is replicated in DDP. A collective call.

    Args:
        local_batch_size: rows of a batch on one rank.
        config: what is asked of tables and exchanges.
        pooling_factors: ids a bag of each table, on average; 1 where none is given.

    Raises:
        UserError: no plan fits the memory of the device, none is what was asked, or nodes differ in their number of
            ranks; on every rank.
    """
    _check_nodes(worker)
    sharding = Sharding.of(config, model, local_batch_size, pooling_factors)
    on_cuda = worker.device.type == "cuda"
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
        # TorchRec's defaults are those of one kind of host: 32 GB a GPU, 128 GB a rank.
        hbm_cap=torch.cuda.get_device_properties(worker.device).total_memory if on_cuda else None,
        ddr_cap=_host_memory() // worker.local_world_size,
    )
    planned = _plan_on_first(model, sharding, topology, worker)
    sharded = DistributedModelParallel(
        model,
        device=worker.device,
        plan=planned.plan,
        sharders=[sharding.sharder],
        # DDP otherwise puts gradients into other buckets after a job's first step, and then adds up three and more
        # ranks in another order: a run that goes on would not train the same bits as one that was never stopped.
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True),
    )
    if any(each["sharding_type"] == ShardingType.TABLE_ROW_WISE.value for each in planned.entries()):
        # TorchRec has made groups of a node's ranks, and of one of each node, with torch's 30 minutes.
        for group in intra_and_cross_node_pg(worker.device):
            _set_pg_timeout(worker.timeout, group)
    return sharded, planned


def _plan_on_first(model: DLRM, sharding: Sharding, topology: Topology, worker: Worker) -> ModelPlan:
    """The first rank plans, by its own memory; what it finds, or why there is none, is every rank's."""
    found: list[Any] = [None, None]
    if worker.is_first:
        try:
            planned = sharding.plan(model, topology)
            found = [
                (planned.plan, planned.tables, planned.dense, planned.reasons, sharding.sharder.chosen),
                None,
            ]
        except UserError as error:
            found = [None, str(error)]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    plan, tables, dense, reasons, sharding.sharder.chosen = found[0]
    return ModelPlan(plan, sharding.sharder, tables, dense, reasons)


def _check_nodes(worker: Worker) -> None:
    """TorchRec counts nodes by each rank's own LOCAL_WORLD_SIZE, and ranks that disagree form other groups."""
    sizes: list[Any] = [None] * worker.world_size
    dist.all_gather_object(sizes, worker.local_world_size)
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise UserError(
                f"the node of rank 0 has {sizes[0]} ranks and that of rank {rank} has {size}; start as many ranks on "
                "every node"
            )


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
