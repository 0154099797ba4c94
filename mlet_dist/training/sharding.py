"""From a DLRM whose tables are on the meta device to TorchRec's DistributedModelParallel."""

import os

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.errors import UserError
from mlet_dist.training.distributed import Worker


def shard_model(model: DLRM, worker: Worker) -> DistributedModelParallel:
    """Plan with TorchRec's planner, shard every W1 row-wise and wrap what is replicated in DDP.

    Raises:
        UserError: the planner finds no plan that fits the memory of the device and of the host.
    """
    sharders = [MultiLayerEmbeddingBagCollectionSharder()]
    on_cuda = worker.device.type == "cuda"
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
        # TorchRec's defaults are those of one kind of host: 32 GB a GPU, 128 GB a rank.
        hbm_cap=torch.cuda.get_device_properties(worker.device).total_memory if on_cuda else None,
        ddr_cap=_host_memory() // worker.local_world_size,
    )
    try:
        plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    except PlannerError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tables do not fit {worker.world_size} ranks on {worker.device.type}: {reason}") from None
    return DistributedModelParallel(model, device=worker.device, plan=plan, sharders=sharders)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
