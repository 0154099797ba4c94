"""From a DLRM whose tables are on the meta device to TorchRec's DistributedModelParallel."""

from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.training.distributed import Worker


def shard_model(model: DLRM, worker: Worker) -> DistributedModelParallel:
    """Plan with TorchRec's planner, shard every W1 row-wise and wrap what is replicated in DDP."""
    sharders = [MultiLayerEmbeddingBagCollectionSharder()]
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
    )
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, device=worker.device, plan=plan, sharders=sharders)
