"""Requirements of sharding a model: nodes of equal size, and timeouts in every process group."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed import comm

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import fuse_row_optimizer
from mlet_dist.training.lost_ranks import timed_out
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.multirank

AUTO = ShardingConfig()


def _shard(local_world_sizes: tuple[int, ...], sharding: ShardingConfig = AUTO, seconds: float = 600) -> str:
    model = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(6,), top_mlp=(6,))
    dlrm = build_training_model(ModelSpec(model, ("I1",), (SparseFeature("C1", 100),), 0), torch.device("meta"))
    fuse_row_optimizer(dlrm, OptimizerConfig())
    rank = dist.get_rank()
    timeout = timedelta(seconds=seconds)
    worker = Worker(rank, dist.get_world_size(), local_world_sizes[rank], torch.device("cpu"), timeout)
    try:
        shard_model(dlrm, worker, 8, sharding)
    except UserError as error:
        return str(error)
    return ""


def test_nodes_of_different_sizes_are_refused_on_every_rank(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(_shard, (2, 2)) == ["", ""]
    message = "the node of rank 0 has 2 ranks and that of rank 1 has 1; start as many ranks on every node"
    assert ranks(2).run(_shard, (2, 1)) == [message, message]


def _wait_in_the_groups_of_nodes() -> list[bool]:
    """Check that a rank alone in a collective within or across nodes gets an error after a second."""
    comm._INTRA_PG = comm._CROSS_PG = None  # of other tests
    try:
        by_rows = ShardingConfig(sharding_types=("table_row_wise",), data_parallel_up_to_mb=0)
        assert _shard((2,) * 4, by_rows, seconds=1) == ""
        return [_is_told(group) for group in (comm._INTRA_PG, comm._CROSS_PG)] if dist.get_rank() == 0 else []
    finally:
        comm._INTRA_PG = comm._CROSS_PG = None


def _is_told(group: dist.ProcessGroup | None) -> bool:
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return timed_out(error)
    return False


def test_the_timeout_holds_in_the_groups_of_nodes(ranks: Callable[..., RankPool]) -> None:
    assert ranks(4, 2).run(_wait_in_the_groups_of_nodes)[0] == [True, True]
