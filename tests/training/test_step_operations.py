"""The collectives of a whole training step, and where its host waits: few, and as many for any number of tables."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed as dist

from benchmarks.step_counters import Operation, StepOperations, count_step_operations
from mlet_dist.config.config_file import load_config
from mlet_dist.training.checkpoint_schedule import CheckpointSchedule
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer
from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import SETTINGS, loader, this_worker, training_of

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
MOST_COLLECTIVES, MOST_WAITS = 6, 2


def _operations(overrides: tuple[str, ...], pipelined: bool) -> tuple[StepOperations, str]:
    """Return the operations of the third step, with all that a run does after it, and the name of the world's group."""
    config = load_config(CONFIG, [*overrides, *SETTINGS, "run.dir=unused"])
    training, _ = training_of(config, 6)
    worker = this_worker()
    guard = Guard(training, worker.device, config.train.on_non_finite, 0)
    saver: Any = SimpleNamespace(has_failed=False)
    training.model.train()
    with StepTimer(training.model, worker.device, 1) as timer:
        schedule = CheckpointSchedule(config.train, saver, StopSignal(), lambda _: {}, None, guard, timer)
        steps = take_steps(training, iter(loader(config)), worker.device, guard, timer, pipelined=pipelined)
        for _ in range(2):
            next(steps)
            schedule(training)
        with count_step_operations() as counts:
            next(steps)
            schedule(training)
        steps.close()
    return counts, dist.group.WORLD.group_name  # type: ignore[union-attr]


def _described(calls: list[Operation]) -> str:
    return "\n".join(f"{call.name} {call.place}" for call in calls)


@pytest.mark.multirank
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_step_has_six_collectives_and_waits_twice(
    ranks: Ranks, small_model: tuple[str, ...], pipelined: bool, policy: str
) -> None:
    row_wise = ("sharding.exchange=unique_rows", "sharding.sharding_types=[row_wise]")
    mixed = ("sharding.exchange=unique_rows", "sharding.tables.C1.sharding_types=[data_parallel]")
    found = []
    for settings in (row_wise, mixed, (*row_wise, "data.sparse_features=[C1,C2]")):
        overrides = (*small_model, *settings, f"train.on_non_finite={policy}")
        for counts, world in ranks(2).run(_operations, overrides, pipelined):
            found.append(counts.collectives)
            assert sum(found[-1].values()) <= MOST_COLLECTIVES, _described(counts.collective_calls)
            assert counts.host_synchronisations <= MOST_WAITS, _described(counts.synchronisation_calls)
            # On CUDA the world's group is NCCL's alone (``process_group.join_ranks``): none is on another one.
            assert {call.group for call in counts.collective_calls} == {world}
    assert all(each == {"alltoall_base_": 4, "allreduce_": 2} for each in found)


@pytest.mark.multirank
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_single_rank_runs_no_collective(ranks: Ranks, small_model: tuple[str, ...], pipelined: bool) -> None:
    settings = ("sharding.exchange=unique_rows", "sharding.sharding_types=[row_wise]")
    ((counts, _),) = ranks(1).run(_operations, (*small_model, *settings), pipelined)
    assert counts.collectives == {}
    assert counts.host_synchronisations <= MOST_WAITS, _described(counts.synchronisation_calls)
