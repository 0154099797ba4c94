"""What the planner chooses, given the latency of collectives."""

import dataclasses
from typing import Any

import pytest
import torch
from torchrec.distributed.planner import Topology

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.collective_time import CollectiveTimes, MeasuredGroup
from mlet_dist.embeddings.planning.cost_model import Device, device_defaults
from mlet_dist.embeddings.planning.plan_cost import slowest_step
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import fuse_row_optimizer
from mlet_dist.training.model_plan import ModelPlan, plan_model

SIZES = {"C1": 45_000_000, "C2": 2_000_000, "C3": 60_000, "C4": 2_200, "C5": 300, "C6": 3}
GPU = Device(
    "gpu", "cuda", 80e9, 3.35e12, 67e12, 450e9, 50e9, host_memory=256e9, host_bandwidth=64e9, **device_defaults("cuda")
)
COLLECTIVES = ("all_to_all", "all_reduce", "reduce_scatter", "all_gather")


def _plan(device: Device, pooling_factor: float = 1.0, ranks: int = 16) -> ModelPlan:
    layers = ModelConfig(embedding_dim=32, hidden_dim=128, bottom_mlp=(64,), top_mlp=(64,))
    spec = ModelSpec(layers, ("I1",), tuple(SparseFeature(name, rows) for name, rows in SIZES.items()), seed=0)
    model = build_training_model(spec, torch.device("meta"), dense_device=torch.device("meta"))
    fuse_row_optimizer(model, OptimizerConfig(name="adagrad"))
    factors = dict.fromkeys(SIZES, pooling_factor)
    sharder = MultiLayerEmbeddingBagCollectionSharder(pooling_factors=factors, local_batch_size=1024)
    topology = Topology(ranks, "cuda", hbm_cap=int(device.memory), local_world_size=8)
    return plan_model(model, sharder, topology, device)


def _types(planned: ModelPlan) -> dict[str, str]:
    return {name: cost.sharding_type for name, (cost, _) in planned.tables.items()}


def _with_latency(seconds: float) -> Device:
    groups: Any = [MeasuredGroup(each, 16, 2, seconds, 1e9) for each in COLLECTIVES]
    return dataclasses.replace(GPU, collectives=CollectiveTimes("nccl", tuple(groups)))


def test_the_choice_does_not_depend_on_differences_below_a_launch() -> None:
    slow = dataclasses.replace(GPU, launch=1.0)
    chosen = _types(_plan(slow))
    # Whatever the rates are, no table saves a second: the option with the least memory is taken.
    for factor in (0.5, 2.0):
        changed = dataclasses.replace(
            slow, network_bandwidth=factor * slow.network_bandwidth, memory_bandwidth=slow.memory_bandwidth / factor
        )
        assert _types(_plan(changed)) == chosen
    assert {chosen[name] for name in ("C1", "C2", "C3", "C4", "C5")} == {"row_wise"}
    assert chosen["C6"] == "data_parallel"  # three rows


def test_types_with_collectives_of_their_own_are_chosen_only_if_they_save_more() -> None:
    free, expensive = (_types(_plan(_with_latency(each), pooling_factor=30.0)) for each in (1e-9, 10.0))
    assert "table_row_wise" in free.values()
    assert set(expensive.values()) <= {"row_wise", "data_parallel"}


def test_the_predicted_step_grows_with_every_cost() -> None:
    planned = _plan(GPU)

    def total(device: Device, busiest: float = 1.0) -> float:
        return slowest_step(planned.tables, planned.dense, device, busiest)[1].total

    cpu = dataclasses.replace(GPU, kind="cpu")  # the parts of a CPU follow one another
    base = total(cpu)
    for slower in (
        {"memory_bandwidth": cpu.memory_bandwidth / 2},
        {"network_bandwidth": cpu.network_bandwidth / 2, "node_bandwidth": cpu.node_bandwidth / 2},
        {"flops": cpu.flops / 2},
        {"ids": cpu.ids / 2},
        {"host_step": 2 * cpu.host_step},
        {"host_table": 2 * cpu.host_table},
        {"reduce_rate": 0.5},
        {"collectives": _with_latency(1e-3).collectives},
    ):
        assert total(dataclasses.replace(cpu, **slower)) > base, slower  # type: ignore[arg-type]
    assert total(cpu, 2.0) > total(cpu, 1.5) > base
    assert [total(GPU, busiest) for busiest in (1.0, 2.0)] == sorted(total(GPU, busiest) for busiest in (1.0, 2.0))


def test_the_host_works_while_a_gpu_does_and_not_while_a_cpu_does() -> None:
    planned = _plan(GPU)
    _, gpu = slowest_step(planned.tables, planned.dense, GPU)
    host = GPU.host_step + len(SIZES) * GPU.host_table
    assert gpu.total == pytest.approx(host)
    assert 0 < gpu.floor < host
    _, cpu = slowest_step(planned.tables, planned.dense, dataclasses.replace(GPU, kind="cpu"))
    assert cpu.floor == host
    assert cpu.total - cpu.floor == pytest.approx(gpu.total - gpu.floor)
    _, busy = slowest_step(planned.tables, planned.dense, dataclasses.replace(GPU, memory_bandwidth=1e9))
    assert busy.floor == 0
