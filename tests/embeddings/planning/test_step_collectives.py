"""The collectives that the planner counts, against those of real steps of training on two ranks."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor

from benchmarks.step_counters import count_step_operations
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig, TableShardingConfig
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.planning.collective_time import CollectiveTimes
from mlet_dist.embeddings.planning.cost_model import HOST_OPERATIONS, TABLE_OPERATIONS
from mlet_dist.embeddings.planning.step_collectives import Group, latency, step_collectives
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import Predicted, take_steps
from mlet_dist.training.timing import StepTimer
from tests.helpers.ranks import RankPool

Ranks = Callable[..., RankPool]
NAMES = {
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
}
BATCH, ROWS, STEPS = 8, 64, 3
UNIQUE = ("row_wise", "unique_rows")
GROUP: Group = (*UNIQUE, False)
PLANS = {  # sharding type and exchange of each table
    "unique rows": [UNIQUE] * 3,
    "more unique rows": [UNIQUE] * 7,
    "unique and replicated rows": [UNIQUE, UNIQUE, ("data_parallel", None)],
    "replicated rows": [("data_parallel", None)] * 2,
    "sums of bags": [("row_wise", "reduce_scatter")] * 2,
    "whole tables": [("table_wise", "auto")] * 3,
    "mixed": [UNIQUE, ("table_wise", "auto"), ("table_wise", "auto"), ("row_wise", "after"), ("data_parallel", None)],
}


def _steps(plan: list[tuple[str, str | None]], worker: Worker) -> tuple[Iterator[Predicted | Finding], list[Group]]:
    names = [f"C{index}" for index in range(len(plan))]
    layers = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(4,), top_mlp=(4,))
    spec = ModelSpec(layers, ("I1",), tuple(SparseFeature(name, ROWS) for name in names), seed=0)
    model, config = build_training_model(spec, torch.device("meta")), OptimizerConfig()
    fuse_row_optimizer(model, config)
    tables = {
        name: TableShardingConfig(sharding_types=(kind,), exchange=exchange)  # type: ignore[arg-type]
        for name, (kind, exchange) in zip(names, plan, strict=True)
    }
    sharded, planned = shard_model(model, worker, BATCH, ShardingConfig(tables=tables))
    sharded.train()
    training = Training(
        sharded, build_optimizer(sharded, config), BinaryMetrics(worker.device), steps=9, batches_per_epoch=9,
        batch_size=BATCH * worker.world_size, rows_per_epoch=9 * BATCH * worker.world_size,
    )  # fmt: skip
    ids = torch.randint(ROWS, (BATCH * len(names),), generator=torch.Generator().manual_seed(worker.rank))
    sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    batch = Batch(torch.rand(BATCH, 1), sparse, torch.zeros(BATCH), BATCH, BATCH * worker.world_size)
    guard, timer = Guard(training, worker.device, "stop", 0), StepTimer(sharded, worker.device, BATCH)
    steps = take_steps(training, repeat(batch), worker.device, guard, timer, pipelined=True)
    return steps, [cost.group for cost, _ in planned.tables.values()]


class _Operations(TorchDispatchMode):
    """Counts the operations of this thread."""

    number = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return operator(*args, **(kwargs or {}))


def _operations(tables: int) -> float:
    worker = Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    steps, _ = _steps([UNIQUE] * tables, worker)
    for _ in islice(steps, 3):
        pass
    with _Operations() as counted:
        for _ in islice(steps, STEPS):
            pass
    return counted.number / STEPS


def _count(plan: list[tuple[str, str | None]]) -> tuple[dict[str, float], list[Group]]:
    worker = Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    steps, groups = _steps(plan, worker)
    for _ in islice(steps, 3):
        pass
    with count_step_operations() as counts:
        for _ in islice(steps, STEPS):
            pass
    return {NAMES[name]: count / STEPS for name, count in counts.collectives.items()}, groups


@pytest.mark.multirank
@pytest.mark.parametrize("plan", PLANS)
def test_the_planner_counts_the_collectives_of_a_step(plan: str, ranks: Ranks) -> None:
    found, groups = ranks(2).run(_count, PLANS[plan])[0]
    expected: Counter[str] = Counter()
    for each in step_collectives(groups, 2, 2):
        expected[each.collective] += each.count
    assert found == dict(expected)


@pytest.mark.multirank
def test_the_planner_counts_the_operations_of_a_step(ranks: Ranks) -> None:
    few, many = (ranks(2).run(_operations, tables)[0] for tables in (4, 20))
    assert (many - few) / 16 == pytest.approx(TABLE_OPERATIONS, abs=2)
    assert few - 4 * TABLE_OPERATIONS == pytest.approx(HOST_OPERATIONS, rel=0.15)


def test_one_more_table_of_a_group_costs_nothing() -> None:
    times = CollectiveTimes("nccl")
    alone = latency([GROUP], 64, 8, times)
    assert sum(each.count for each in step_collectives([GROUP], 64, 8)) == 6
    assert latency([GROUP] * 26 + [("data_parallel", None, False)], 64, 8, times) == alone
    assert latency([GROUP, ("table_wise", "all_to_all", False)], 64, 8, times) > alone
    assert step_collectives([GROUP], 1, 1) == []
    sequences = latency([GROUP, (*UNIQUE, True)], 64, 8, times)
    assert sequences - alone == pytest.approx(4 * times.latency("all_to_all", 64, 8))


def test_groups_within_nodes_are_smaller() -> None:
    found = {each.scope: each for each in step_collectives([("table_row_wise", "reduce_scatter", False)], 64, 8)}
    assert (found["node"].ranks, found["node"].nodes) == (8, 1)
    assert (found["cross"].ranks, found["cross"].nodes) == (8, 8)
