"""The planner's estimates against the memory and the traffic of sharded models."""

import dataclasses
import os
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.models.dlrm import DLRM
from torchrec.optim.keyed import CombinedOptimizer

from benchmarks.traffic import count_traffic
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import RowsDtype
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.cost_model import (
    Device,
    Memory,
    Optimizer,
    Step,
    all_reduce_step,
    step_time,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.planning.dense_cost import PROCESS_BYTES, DenseCost
from mlet_dist.embeddings.planning.plan_cost import fullest_memory, memory_of_rank, optimizer_of
from mlet_dist.embeddings.planning.planner import multi_layer_planner
from mlet_dist.embeddings.planning.table_cost import TableCost
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.sharded.collectives import exchange_codecs
from mlet_dist.embeddings.sharded.exchange_choice import TableTraffic
from mlet_dist.embeddings.sharded.placement import max_rows_per_rank
from mlet_dist.embeddings.sharded.row_lookup import PADDED_BYTES
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.model_plan import ModelPlan, plan_model
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import row_tables_of

Ranks = Callable[..., RankPool]
SIZES = (20_000, 20_000, 15_001, 9_999, 1)  # the last has too few rows to be sharded
K, D, LOCAL_BATCH = 64, 16, 1024
SETTINGS = [  # sharding type of all tables, or "mixed"; exchange; ranks; ranks per node
    *(
        ("row_wise", exchange, size, size)
        for exchange in ("after", "reduce_scatter", "unique_rows")
        for size in (1, 2, 4)
    ),
    *(("table_wise", exchange, size, size) for exchange in ("after", "reduce_scatter") for size in (1, 2, 4)),
    *(("table_row_wise", exchange, 4, 2) for exchange in ("after", "reduce_scatter")),
    *(("data_parallel", "auto", size, size) for size in (1, 2, 4)),
    ("mixed", "auto", 2, 2),
    ("mixed", "auto", 4, 2),
]
MIXED = ("row_wise", "table_wise", "table_row_wise", "data_parallel", "table_wise")
CPU = torch.device("cpu")


def _model(optimizer: str = "sgd", rows_dtype: RowsDtype = "fp32", kind: str = "") -> DLRM:
    layers = ModelConfig(embedding_dim=D, hidden_dim=K, bottom_mlp=(64,), top_mlp=(64,))
    features = tuple(SparseFeature(f"C{index}", rows) for index, rows in enumerate(SIZES))
    ranges = {}
    for feature in features if kind == "ranges" else ():
        sizes = [feature.num_embeddings // 8, feature.num_embeddings // 4]
        sizes = [feature.num_embeddings - sum(sizes), *sizes] if all(sizes) else [feature.num_embeddings]
        ranges[feature.name] = tuple(
            (rows, width, rows / feature.num_embeddings) for rows, width in zip(sizes, (K, 4, D), strict=False)
        )
    spec = ModelSpec(layers, ("I1", "I2"), features, 0, row_ranges=ranges)
    model = build_training_model(spec, torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    return model


def _planned(
    model: DLRM,
    kind: str,
    exchange: Any,
    world_size: int,
    local_world_size: int,
    ids_a_bag: int = 1,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
) -> ModelPlan:
    tables = model.sparse_arch.embedding_bag_collection.row_tables()
    factors = {table.name: ids_a_bag * fmean(each.share for each in segments_of([table])) for table in tables}
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        exchange=exchange, pooling_factors=factors, local_batch_size=LOCAL_BATCH, qcomm_codecs_registry=codecs
    )
    topology = Topology(world_size, "cpu", ddr_cap=1 << 33, local_world_size=local_world_size)
    kinds = MIXED if kind == "mixed" else [kind] * len(SIZES)
    constraints = {
        f"C{index}": ParameterConstraints(sharding_types=[each])
        for index, each in enumerate(kinds)
        if kind != "ranges" and (SIZES[index] >= 4 or each in ("table_wise", "data_parallel"))
    }
    return plan_model(model, sharder, topology, constraints=constraints)


def _batch(generator: torch.Generator, ids_a_bag: int) -> KeyedJaggedTensor:
    ids = [torch.randint(0, rows, (LOCAL_BATCH * ids_a_bag,), generator=generator) for rows in SIZES]
    lengths = torch.full((len(SIZES) * LOCAL_BATCH,), ids_a_bag, dtype=torch.int32)
    return KeyedJaggedTensor([f"C{index}" for index in range(len(SIZES))], torch.cat(ids), lengths=lengths)


def _local_world_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"])


def _sharded(
    optimizer: str, kind: str, exchange: str, ids_a_bag: int, precision: RowsDtype
) -> tuple[DistributedModelParallel, CombinedOptimizer, ModelPlan, Callable[[], None]]:
    model = _model(optimizer, precision, kind)
    codecs = exchange_codecs(precision, precision)
    planned = _planned(model, kind, exchange, dist.get_world_size(), _local_world_size(), ids_a_bag, codecs)
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


def _resident_bytes(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> int:
    """Return the bytes of the storages of weights, gradients and optimizer states, without step counters."""
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
    """Return the peak of torch's CPU allocations during a step, beyond those before it.

    In about every second step the profiler misses memory that gloo's threads free. Only steps whose allocations and
    frees balance are counted.
    """
    peaks: list[int] = []
    for _ in range(60):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        assert profiler.profiler is not None
        events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        if abs(allocated) < 1 << 15:
            peaks.append(peak)
        fewest = torch.tensor(len(peaks))
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        if int(fewest) >= 3:
            return max(peaks)
    raise AssertionError(f"the allocations of only {len(peaks)} of 60 steps balance")


def _memory(
    optimizer: str, kind: str, exchange: str, ids_a_bag: int, precision: RowsDtype = "fp32"
) -> tuple[int, int, Memory]:
    sharded, stepper, planned, step = _sharded(optimizer, kind, exchange, ids_a_bag, precision)
    estimate = memory_of_rank(planned.tables, planned.dense, dist.get_rank())
    assert estimate.process >= PROCESS_BYTES
    estimate = dataclasses.replace(estimate, process=0)  # what torch's allocator does not count
    return _resident_bytes(sharded, stepper), _peak_bytes(step), estimate


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("kind", "exchange", "world_size", "local_world_size", "optimizer", "ids_a_bag"),
    [
        (*setting, *more)
        for setting in SETTINGS
        for more in (("sgd", 1), ("adagrad", 1), ("rowwise_adagrad", 10))
        if (more[0] != "adagrad" or setting[2] > 1) and (more[0] != "sgd" or setting[2] < 4)
    ],
)
def test_estimated_memory_is_that_of_a_rank(
    ranks: Ranks,
    kind: str,
    exchange: str,
    world_size: int,
    local_world_size: int,
    optimizer: str,
    ids_a_bag: int,
) -> None:
    found = ranks(world_size, local_world_size).run(_memory, optimizer, kind, exchange, ids_a_bag)
    for resident, peak, estimate in found:
        assert estimate.weights + estimate.optimizer + estimate.dense == resident
        assert resident + peak <= estimate.total <= 1.25 * (resident + peak)


@pytest.mark.multirank
@pytest.mark.parametrize("exchange", ["after", "unique_rows"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_adam_without_a_fused_kernel_needs_a_dense_gradient(ranks: Ranks, world_size: int, exchange: str) -> None:
    for resident, peak, estimate in ranks(world_size).run(_memory, "adam", "row_wise", exchange, 1):
        assert estimate.weights + estimate.optimizer + estimate.dense == resident
        assert resident + peak <= estimate.total


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "optimizer", "ids_a_bag"), [(1, "adagrad", 1), (2, "rowwise_adagrad", 10)])
def test_estimated_memory_of_row_ranges(ranks: Ranks, world_size: int, optimizer: str, ids_a_bag: int) -> None:
    # The buffers of pools are added, each at its own peak. With long bags that of wide rows is in backward, and that of
    # narrow rows and of bags' vectors in forward.
    most = 1.25 if ids_a_bag == 1 else 1.4
    for resident, peak, estimate in ranks(world_size).run(_memory, optimizer, "ranges", "unique_rows", ids_a_bag):
        assert estimate.weights + estimate.optimizer + estimate.dense == resident
        assert resident + peak <= estimate.total <= most * (resident + peak)


@pytest.mark.multirank
def test_memory_in_half_precision(ranks: Ranks) -> None:
    for resident, peak, estimate in ranks(4, 2).run(_memory, "adagrad", "mixed", "auto", 1, "fp16"):
        assert estimate.weights + estimate.optimizer + estimate.dense == resident
        assert resident + peak <= estimate.total <= 1.25 * (resident + peak)


def _traffic(kind: str, exchange: str, ids_a_bag: int, forward: Any, backward: Any) -> tuple[int, int, Step]:
    """Return the bytes of vectors, the all-reduced bytes of W2, and the estimate with the batch's distinct ids."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model = _model()
    codecs = exchange_codecs(forward, backward)
    planned = _planned(model, kind, exchange, world_size, _local_world_size(), ids_a_bag, codecs)
    sharded = DistributedModelParallel(model, device=CPU, plan=planned.plan, sharders=[planned.sharder])
    embeddings = sharded.module.sparse_arch.embedding_bag_collection
    batch = _batch(torch.Generator().manual_seed(rank), ids_a_bag)
    embeddings(batch).values()  # the first forward pass includes lazy initialization
    with count_traffic() as sent:
        embeddings(batch).values().sum().backward()
    steps = []
    for name, (cost, rows) in planned.tables.items():
        if cost.exchange == "unique_rows":
            spec = planned.plan.plan["sparse_arch.embedding_bag_collection"][name].sharding_spec
            own = next(shard for shard in spec.shards if shard.placement.rank() == rank)
            order = next(each.row_order for each in row_tables_of(sharded) if each.name == name)
            ids = order.stored_rows(batch[name].values().unique())
            first = own.shard_offsets[0]
            away = int(((ids < first) | (ids >= first + own.shard_sizes[0])).sum())
            # Of u ids that are spread evenly, u·(R-1)/R are on other ranks.
            cost = dataclasses.replace(cost, distinct_ids=away * world_size / (world_size - 1))
        steps.append(cost.step(owns_rows=rows[rank] > 0))
    return sent.vector_bytes, sent.weight_bytes, total_step(steps)


@pytest.mark.multirank
@pytest.mark.parametrize(("forward", "backward", "ids_a_bag"), [("fp32", "fp32", 1), ("fp16", "fp32", 10)])
@pytest.mark.parametrize(
    ("kind", "exchange", "world_size", "local_world_size"), [each for each in SETTINGS if each[2] > 1]
)
def test_estimated_bytes_are_those_of_the_collectives(
    ranks: Ranks,
    kind: str,
    exchange: str,
    world_size: int,
    local_world_size: int,
    ids_a_bag: int,
    forward: str,
    backward: str,
) -> None:
    found = ranks(world_size, local_world_size).run(_traffic, kind, exchange, ids_a_bag, forward, backward)
    projections = len(SIZES) * K * D * 4
    kinds = MIXED if kind == "mixed" else [kind] * len(SIZES)
    replicated = sum(
        rows
        for each, rows in zip(kinds, SIZES, strict=True)
        if each == "data_parallel" or rows == each.endswith("row_wise")
    )
    for _, weight_bytes, estimate in found:
        assert weight_bytes == projections
        # count_traffic does not see DDP's all-reduce, which is not a call of torch.distributed.
        assert estimate.weight_bytes == projections + replicated * K * 4
    if exchange != "unique_rows" and kind != "mixed":
        assert all(vector_bytes == estimate.vector_bytes for vector_bytes, _, estimate in found)
    # A rank sends the rows that others requested, and the gradients of those that it requested.
    total = sum(estimate.vector_bytes for *_, estimate in found)
    assert sum(vector_bytes for vector_bytes, *_ in found) == pytest.approx(total, abs=1e-3)


def _cost(**changes: Any) -> TableCost:
    traffic = TableTraffic(1000, 4, 1.0, 1, 8)
    cost = TableCost("t", 16, True, traffic, "adagrad", "row_wise", "reduce_scatter", 4, 2)
    return dataclasses.replace(cost, **changes)


def test_costs_of_row_wise_by_hand() -> None:
    memory = _cost().memory(250)
    assert (memory.weights, memory.optimizer) == (250 * 16 * 4, 250 * 16 * 4)
    assert memory.dense == 3 * 16 * 4 * 4  # W2, its gradient and sum
    assert _cost(optimizer="rowwise_adagrad").memory(250).optimizer == 250 * 4
    assert _cost(optimizer="adam").memory(250).optimizer == 2 * 250 * 16 * 4
    assert _cost(projected=False).memory(250).dense == 0
    assert _cost(row_bytes=2).memory(250).weights == 250 * 16 * 2
    step = _cost().step()
    assert step.vector_bytes == 2 * 8 * 3 * 4 * 4
    assert step.flops == 6 * 8 * 4 * 16 * 4  # each rank projects the partial sums of all ranks' bags
    assert _cost(exchange="after").step().vector_bytes == 2 * 8 * 3 * 16 * 4
    assert _cost(exchange="unique_rows", distinct_ids=6).step().vector_bytes == 2 * 6 * 0.75 * 4 * 4
    assert _cost(value_bytes=(2, 4)).step().vector_bytes == (2 + 4) * 8 * 3 * 4
    assert _cost(sharding_type="data_parallel", exchange=None).step().weight_bytes == (1000 * 16 + 16 * 4) * 4
    assert [max_rows_per_rank(rows, 16, 4, on_cpu=True) for rows in (3, 4, 5, 8, 1000)] == [None, 1, None, 2, 250]
    assert [max_rows_per_rank(500_000, width, 1024, on_cpu=False) for width in (8, 512)] == [None, 489]
    assert total_memory([Memory(1, 2, 3, 4), Memory(1, 1, 1, 1)]).total == 14


def test_only_rows_without_a_fused_optimizer_have_a_padded_copy_on_a_cpu() -> None:
    unique = _cost(exchange="unique_rows", distinct_ids=6, on_cpu=True)  # 6 rows are requested of each of 4 owners
    others = 4 * 6 * 4 + 5 * 8 * 8  # projected rows and ids
    optimizers: tuple[Optimizer, ...] = ("sgd", "adagrad", "rowwise_adagrad")
    for projected in (True, False):
        single = dataclasses.replace(unique, projected=projected)
        copies = 1 if projected else 2  # the gradient takes the place of rows that W2 projects
        for optimizer in optimizers:
            buffers = dataclasses.replace(single, optimizer=optimizer).owner_memory(250).buffers
            assert buffers == 4 * copies * 6 * 16 + others + (4 * 6 * 4 if projected else 0)
        padded = dataclasses.replace(single, optimizer="adam")
        assert padded.owner_memory(250).buffers == 4 * (copies + 1) * 6 * 16 + others + (4 * 6 * 4 if projected else 0)
        wide = dataclasses.replace(padded, row_width=PADDED_BYTES // 4 // 6 + 1)  # has a kernel of its own
        assert wide.owner_memory(250).buffers == 4 * copies * 6 * wide.row_width + others + (
            4 * 6 * 4 if projected else 0
        )


def test_costs_of_table_wise_by_hand() -> None:
    owned = _cost(sharding_type="table_wise", exchange="all_to_all")
    owner, other = owned.step(), owned.step(owns_rows=False)
    vectors = 8 * 4 * 4  # of a rank's bags
    assert (owner.vector_bytes, other.vector_bytes) == (3 * vectors, vectors)  # vectors sent, and gradients sent
    assert (owner.flops, other.flops) == (6 * 8 * 4 * 16 * 4, 0)
    ids = 8 * 8 + 8 * 4
    assert owner.index_bytes == 0
    assert other.index_bytes == ids
    # One other rank is in the same node, two are not. W2's gradients are sent 2·3/4 times in the node and 2·1/2/2 times
    # between nodes.
    weights = 16 * 4 * 4
    assert owner.node_owner_bytes == 2 * vectors + ids + 1.5 * weights
    assert owner.network_owner_bytes == pytest.approx(2 * (2 * vectors + ids) + 0.5 * weights)
    assert owned.memory(0).weights == 0
    assert owned.memory(0).dense == owned.memory(1000).dense


def test_costs_of_table_row_wise_by_hand() -> None:
    cost = _cost(sharding_type="table_row_wise")
    vectors = 8 * 4 * 4
    assert cost.num_owners == 2
    # Sent are two nodes' vectors and gradients to the other rank of the node, and vectors to the other node.
    assert cost.step().vector_bytes == 2 * 2 * vectors + vectors
    assert cost.step(owns_rows=False).vector_bytes == vectors
    assert cost.step().flops == 6 * 8 * 4 * 16 * 4


def test_costs_of_rows_in_host_memory_by_hand() -> None:
    row = 16 * 4
    hosted = _cost(kernel="fused_uvm", exchange="unique_rows", distinct_ids=6, optimizer="sgd")
    memory = hosted.owner_memory(250)
    assert (memory.weights, memory.optimizer, memory.host) == (0, 0, 250 * row)
    owned = TableTraffic(1000, 4, 1.0, 1, 8).distinct_ids(4) / 4
    rows = min(owned, 6)
    assert hosted.step().host_bytes == pytest.approx(2 * rows * row)  # read by the lookup and by the update
    cached = dataclasses.replace(hosted, kernel="fused_uvm_caching", cache_load_factor=0.2)
    memory = cached.owner_memory(250)
    assert memory.weights == 64 * (row + 16) + 250 * 4  # 50 rows in sets of 32
    assert cached.step().host_bytes == pytest.approx(0.8 * rows * row)
    # fbgemm keeps a state of one number per row on the device, and one of k numbers per row with the rows.
    one, many = (dataclasses.replace(cached, optimizer=name) for name in ("rowwise_adagrad", "adagrad"))
    assert (one.owner_memory(250).optimizer, one.owner_memory(250).host) == (250 * 4, 250 * row)
    assert (many.owner_memory(250).optimizer, many.owner_memory(250).host) == (0, 2 * 250 * row)
    assert many.step().host_bytes == pytest.approx(1.8 * rows * row)


def test_the_fullest_host_may_be_that_of_another_rank_than_the_fullest_device() -> None:
    dense = DenseCost(0, 0, 5, 9, 8, "sgd", 2, 2)
    owned = _cost(sharding_type="table_wise", exchange="all_to_all", world_size=2, optimizer="sgd")
    hosted = dataclasses.replace(owned, kernel="fused_uvm")
    memory = fullest_memory({"device": (owned, [1000, 0]), "host": (hosted, [0, 1000])}, dense)
    assert (memory.weights, memory.host) == (1000 * 16 * 4, 1000 * 16 * 4)


def test_on_a_cpu_activations_share_no_memory_with_the_buffers_of_tables() -> None:
    on_cuda = DenseCost(0, 0, 5, 9, 8, "sgd", 2, 2)  # 8 rows of 5 floats
    on_cpu = dataclasses.replace(on_cuda, on_cpu=True)
    for table_gradients, beyond in ((0, 160), (50, 110), (500, 0)):
        assert on_cuda.memory(table_gradients) == Memory(buffers=beyond)
        assert on_cpu.memory(table_gradients) == Memory(buffers=beyond, process=PROCESS_BYTES + 160 - beyond)
    assert on_cpu.memory().checkpoint_copy == 0


def test_step_time_by_hand() -> None:
    device = Device("toy", "cuda", 1e9, memory_bandwidth=100, flops=1000, node_bandwidth=30, network_bandwidth=10)
    step = Step(
        node_owner_bytes=60,
        node_requester_bytes=90,
        network_owner_bytes=200,
        network_requester_bytes=10,
        memory_bytes=200,
        flops=500,
    )
    time = step_time(step, device)
    # Both directions of a link work in parallel, and so do both links.
    assert (time.network, time.memory, time.host, time.compute, time.bound) == (20.0, 2.0, 0.0, 0.5, "network")
    hosted = step_time(Step(host_bytes=40), dataclasses.replace(device, host_bandwidth=8))
    assert (hosted.host, hosted.bound) == (5.0, "host link")
    reduced = step_time(all_reduce_step(100, world_size=4, local_world_size=2), device)
    assert reduced.network == pytest.approx(max(2 * 100 * 3 / 4 / 30, 2 * 100 / 2 / 2 / 10))


def test_the_planner_uses_these_estimates() -> None:
    planned = _planned(_model("adagrad"), "row_wise", "auto", 4, 4)
    needed = [memory_of_rank(planned.tables, planned.dense, rank) for rank in range(4)]
    enough = int(max(each.total for each in needed) / 0.85) + len(SIZES)
    sharder, model = planned.sharder, _model("adagrad")
    tables = model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    of_tables = total_memory(cost.memory(rows[0]) for cost, rows in planned.tables.values())
    dense = planned.dense.memory(of_tables.buffers).total
    row_wise = {f"C{index}": ParameterConstraints(sharding_types=["row_wise"]) for index in range(4)}

    def plan(memory: int) -> None:
        topology = Topology(4, "cpu", ddr_cap=memory, local_world_size=4)
        planner = multi_layer_planner(tables, topology, sharder, dense_bytes=dense, constraints=row_wise)
        planner.plan(model, [sharder])

    plan(enough)
    with pytest.raises(PlannerError):
        plan(int(enough * 0.98))


def test_an_unknown_optimizer_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    assert optimizer_of(weight) == "sgd"
    weight._optimizer_classes = [torch.optim.RMSprop]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="optimizer RMSprop of the rows"):
        optimizer_of(weight)
