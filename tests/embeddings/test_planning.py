"""Estimates against what sharded models hold and send."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.models.dlrm import DLRM
from torchrec.optim.keyed import CombinedOptimizer

from benchmarks.traffic import count_traffic
from mlet_dist.config import ModelConfig, OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.costs import (
    Device,
    Memory,
    Step,
    TableCost,
    memory_of_rank,
    rows_of_rank,
    step_time,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.exchange import TableTraffic
from mlet_dist.embeddings.planning import multi_layer_planner, optimizer_of
from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.sharding import ModelPlan, plan_model
from tests.ranks import RankPool

Ranks = Callable[[int], RankPool]
SIZES = (20_000, 20_000, 15_001, 9_999, 1)  # the last has too few rows to be sharded
K, D, LOCAL_BATCH = 64, 16, 1024
WAYS = ("after", "reduce_scatter", "unique_rows")
CPU = torch.device("cpu")


def _model(optimizer: str = "sgd") -> DLRM:
    layers = ModelConfig(embedding_dim=D, hidden_dim=K, bottom_mlp=(64,), top_mlp=(64,))
    features = tuple(SparseFeature(f"C{index}", rows) for index, rows in enumerate(SIZES))
    model = build_dlrm(ModelSpec(layers, ("I1", "I2"), features, 0), torch.device("meta"))
    fuse_row_optimizer(model, OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    return model


def _planned(model: DLRM, exchange: Any, world_size: int, ids_a_bag: int = 1, memory: int = 1 << 33) -> ModelPlan:
    factors = {f"C{index}": float(ids_a_bag) for index in range(len(SIZES))}
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        exchange=exchange, pooling_factors=factors, local_batch_size=LOCAL_BATCH
    )
    topology = Topology(world_size, "cpu", ddr_cap=memory, local_world_size=world_size)
    return plan_model(model, sharder, topology)


def _batch(generator: torch.Generator, ids_a_bag: int) -> KeyedJaggedTensor:
    ids = [torch.randint(0, rows, (LOCAL_BATCH * ids_a_bag,), generator=generator) for rows in SIZES]
    lengths = torch.full((len(SIZES) * LOCAL_BATCH,), ids_a_bag, dtype=torch.int32)
    return KeyedJaggedTensor([f"C{index}" for index in range(len(SIZES))], torch.cat(ids), lengths=lengths)


def _sharded(
    optimizer: str, exchange: str, ids_a_bag: int
) -> tuple[DistributedModelParallel, CombinedOptimizer, ModelPlan, Callable[[], None]]:
    model = _model(optimizer)
    planned = _planned(model, exchange, dist.get_world_size(), ids_a_bag)
    sharded = DistributedModelParallel(model, device=CPU, plan=planned.plan, sharders=[planned.sharder])
    stepper = build_optimizer(sharded, OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        stepper.zero_grad()
        logits = sharded(torch.rand(LOCAL_BATCH, 2), _batch(generator, ids_a_bag)).squeeze(-1)
        functional.binary_cross_entropy_with_logits(logits, torch.ones(LOCAL_BATCH)).backward()
        stepper.step()

    step()
    return sharded, stepper, planned, step


def _held_bytes(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> int:
    """Of the storages of weights, gradients and optimizer states, without their step counters."""
    tensors = list(model.parameters())
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for _, part in optimizer.optimizers:
        for states in part.state_dict()["state"].values():
            for name, state in states.items():
                if name.rpartition(".")[2] != "step":
                    is_sharded = hasattr(state, "local_shards")
                    tensors += [shard.tensor for shard in state.local_shards()] if is_sharded else [state]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _peak_bytes(step: Callable[[], None]) -> int:
    """What torch's CPU allocator holds at a step's peak beyond what it held before.

    The profiler misses what gloo's threads free, in about every second step; a step counts if what it allocated and
    what it freed balance.
    """
    peaks: list[int] = []
    for _ in range(60):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        assert profiler.profiler is not None
        events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        if abs(held) < 1 << 15:
            peaks.append(peak)
        fewest = torch.tensor(len(peaks))
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        if int(fewest) >= 3:
            return max(peaks)
    raise AssertionError(f"of 60 steps only {len(peaks)} balance")


def _memory(optimizer: str, exchange: str, ids_a_bag: int) -> tuple[int, int, Memory]:
    sharded, stepper, planned, step = _sharded(optimizer, exchange, ids_a_bag)
    estimate = memory_of_rank(planned.tables, planned.dense, dist.get_rank())
    return _held_bytes(sharded, stepper), _peak_bytes(step), estimate


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("exchange", WAYS)
@pytest.mark.parametrize(("optimizer", "ids_a_bag"), [("sgd", 1), ("adagrad", 1), ("rowwise_adagrad", 10)])
def test_memory_is_what_a_rank_holds(
    ranks: Ranks, world_size: int, exchange: str, optimizer: str, ids_a_bag: int
) -> None:
    for held, peak, estimate in ranks(world_size).run(_memory, optimizer, exchange, ids_a_bag):
        assert estimate.weights + estimate.optimizer + estimate.dense == held
        assert held + peak <= estimate.total <= 1.25 * (held + peak)


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2])
def test_adam_without_a_fused_kernel_holds_a_dense_gradient(ranks: Ranks, world_size: int) -> None:
    for held, _, estimate in ranks(world_size).run(_memory, "adam", "after", 1):
        assert estimate.weights + estimate.optimizer + estimate.dense == held


def _traffic(exchange: str, ids_a_bag: int) -> tuple[int, int, Step]:
    """(bytes of vectors, bytes of all-reduced weights of W2, the estimate with the distinct ids of the batch)."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model = _model()
    planned = _planned(model, exchange, world_size, ids_a_bag)
    sharded = DistributedModelParallel(model, device=CPU, plan=planned.plan, sharders=[planned.sharder])
    embeddings = sharded.module.sparse_arch.embedding_bag_collection
    batch = _batch(torch.Generator().manual_seed(rank), ids_a_bag)
    embeddings(batch).values()  # the first forward pass also builds what is built lazily
    with count_traffic() as sent:
        embeddings(batch).values().sum().backward()
    costs = []
    for name, (cost, _) in planned.tables.items():
        if cost.way == "unique_rows":
            spec = planned.plan.plan["sparse_arch.embedding_bag_collection"][name].sharding_spec
            own = next(shard for shard in spec.shards if shard.placement.rank() == rank)
            ids = batch[name].values().unique()
            first = own.shard_offsets[0]
            away = int(((ids < first) | (ids >= first + own.shard_sizes[0])).sum())
            # Of u ids spread evenly, u·(R-1)/R lie on other ranks.
            cost = dataclasses.replace(cost, distinct_ids=away * world_size / (world_size - 1))
        costs.append(cost)
    return sent.vector_bytes, sent.weight_bytes, total_step(cost.step() for cost in costs)


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("ids_a_bag", [1, 10])
@pytest.mark.parametrize("exchange", WAYS)
def test_bytes_are_what_collectives_carry(ranks: Ranks, world_size: int, exchange: str, ids_a_bag: int) -> None:
    found = ranks(world_size).run(_traffic, exchange, ids_a_bag)
    projections = len(SIZES) * K * D * 4
    for _, weight_bytes, estimate in found:
        assert weight_bytes == projections
        assert estimate.weight_bytes == projections + SIZES[-1] * K * 4  # DDP's all-reduce is not torch.distributed's
    if exchange != "unique_rows":
        assert all(vector_bytes == estimate.vector_bytes for vector_bytes, _, estimate in found)
    # A rank sends the rows that others ask for and the gradients of those that it asked for.
    total = sum(estimate.vector_bytes for *_, estimate in found)
    assert sum(vector_bytes for vector_bytes, *_ in found) == pytest.approx(total, abs=1e-3)


def _cost(**changes: Any) -> TableCost:
    traffic = TableTraffic(1000, 4, 1.0, 1, 8)
    cost = TableCost("t", 16, True, traffic, "adagrad", "reduce_scatter", 4)
    return dataclasses.replace(cost, **changes)


def test_by_hand() -> None:
    memory = _cost().memory(250)
    assert (memory.weights, memory.optimizer) == (250 * 16 * 4, 250 * 16 * 4)
    assert memory.dense == 3 * 16 * 4 * 4  # W2, its gradient and sum
    assert _cost(optimizer="rowwise_adagrad").memory(250).optimizer == 250 * 4
    assert _cost(optimizer="adam").memory(250).optimizer == 2 * 250 * 16 * 4
    assert _cost(projected=False).memory(250).dense == 0
    step = _cost().step()
    assert step.vector_bytes == 2 * 8 * 3 * 4 * 4
    assert step.flops == 6 * 8 * 4 * 16 * 4  # each rank projects the partial sums of all ranks' bags
    assert _cost(way="after").step().vector_bytes == 2 * 8 * 3 * 16 * 4
    assert _cost(way="unique_rows", distinct_ids=6).step().vector_bytes == 2 * 6 * 0.75 * 4 * 4
    assert _cost(way="replicated").step().weight_bytes == (1000 * 16 + 16 * 4) * 4
    assert [rows_of_rank(rows, 16, 4, on_cpu=True) for rows in (3, 4, 5, 8, 1000)] == [None, 1, None, 2, 250]
    assert [rows_of_rank(500_000, width, 1024, on_cpu=False) for width in (8, 512)] == [None, 489]
    assert total_memory([Memory(1, 2, 3, 4), Memory(1, 1, 1, 1)]).total == 14


def test_time_by_hand() -> None:
    device = Device("toy", "cuda", 1e9, memory_bandwidth=100, flops=1000, node_bandwidth=30, network_bandwidth=10)
    time = step_time(Step(vector_bytes=300, memory_bytes=200, flops=500), device, world_size=4, local_world_size=2)
    # A third goes to the other rank of the node in 100/30 s, the rest to the other node in 200/10 s.
    assert (time.network, time.memory, time.compute, time.bound) == (20.0, 2.0, 0.5, "network")
    reduced = step_time(Step(weight_bytes=100), device, world_size=4, local_world_size=2)
    assert reduced.network == pytest.approx(max(2 * 100 * 3 / 4 / 30, 2 * 100 / 2 / 2 / 10))


def test_the_planner_uses_these_numbers() -> None:
    planned = _planned(_model("adagrad"), "auto", 4)
    largest = max((memory_of_rank(planned.tables, planned.dense, rank) for rank in range(4)), key=lambda m: m.total)
    enough = int(largest.total / 0.85) + len(SIZES)
    sharder, model = planned.sharder, _model("adagrad")
    dense = planned.dense.total

    def plan(memory: int) -> None:
        topology = Topology(4, "cpu", ddr_cap=memory, local_world_size=4)
        multi_layer_planner(topology, sharder, dense_bytes=dense).plan(model, [sharder])

    plan(enough)
    with pytest.raises(PlannerError):
        plan(int(enough * 0.98))


def test_an_unknown_optimizer_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    assert optimizer_of(weight) == "sgd"
    weight._optimizer_classes = [torch.optim.RMSprop]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="optimizer RMSprop of the rows"):
        optimizer_of(weight)
