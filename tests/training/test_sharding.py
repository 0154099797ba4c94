"""What a job must be for its model to be sharded."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed import comm

from mlet_dist.config import ModelConfig, OptimizerConfig, ShardingConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.distributed import Worker
from mlet_dist.training.optimizers import fuse_row_optimizer
from mlet_dist.training.sharding import shard_model
from tests.ranks import RankPool

pytestmark = pytest.mark.multirank
_BY_DEFAULT = ShardingConfig()


def _shard(local_world_sizes: tuple[int, ...], config: ShardingConfig = _BY_DEFAULT) -> str:
    model = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(6,), top_mlp=(6,))
    dlrm = build_dlrm(ModelSpec(model, ("I1",), (SparseFeature("C1", 100),), 0), torch.device("meta"))
    fuse_row_optimizer(dlrm, OptimizerConfig())
    rank = dist.get_rank()
    worker = Worker(rank, dist.get_world_size(), local_world_sizes[rank], torch.device("cpu"))
    try:
        shard_model(dlrm, worker, 8, config)
    except UserError as error:
        return str(error)
    return ""


def test_nodes_of_different_sizes_are_refused_on_every_rank(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(_shard, (2, 2)) == ["", ""]
    message = "the node of rank 0 has 2 ranks and that of rank 1 has 1; start as many ranks on every node"
    assert ranks(2).run(_shard, (2, 1)) == [message, message]


def _timeouts_of_node_groups() -> list[timedelta]:
    assert dist.group.WORLD is not None
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77), dist.group.WORLD)
    try:
        assert _shard((2,) * 4, ShardingConfig(sharding_types=("table_row_wise",), data_parallel_up_to_mb=0)) == ""
        groups = comm._INTRA_PG, comm._CROSS_PG
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups if group is not None]
    finally:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=30), dist.group.WORLD)


def test_the_groups_of_nodes_wait_no_longer_than_all_ranks(ranks: Callable[..., RankPool]) -> None:
    assert ranks(4, 2).run(_timeouts_of_node_groups) == 4 * [2 * [timedelta(seconds=77)]]
