"""Latencies of collectives: how they grow with the group, by backend, and how measured groups replace defaults."""

import pytest

from mlet_dist.embeddings.planning.collective_time import (
    COLLECTIVES,
    Backend,
    Collective,
    CollectiveTimes,
    MeasuredGroup,
    default_latency,
)

BACKENDS: tuple[Backend, ...] = ("nccl", "gloo")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_latency_grows_with_ranks_and_nodes(backend: Backend, collective: Collective) -> None:
    sizes = [(2, 1), (4, 1), (8, 1), (16, 2), (64, 8), (1024, 128)]
    found = [default_latency(backend, collective, *size) for size in sizes]
    assert found == sorted(found)
    assert found[0] > 1e-6
    assert default_latency(backend, collective, 8, 8) > default_latency(backend, collective, 8, 1)


def test_a_single_rank_waits_for_nobody() -> None:
    assert CollectiveTimes("nccl").latency("all_to_all", 1) == 0.0


def test_an_all_reduce_grows_by_the_logarithm_on_nccl_and_by_the_ring_on_gloo() -> None:
    nccl, gloo = ([default_latency(each, "all_reduce", 8 * nodes, nodes) for nodes in (8, 64)] for each in BACKENDS)
    # 3 more doublings of the nodes, of two hops of 5 us each.
    assert nccl[1] - nccl[0] == pytest.approx(2 * 3 * 5.0e-6)
    assert (gloo[1] - 50e-6) / (gloo[0] - 50e-6) == pytest.approx((8 * 64 - 1) / (8 * 8 - 1))


def test_the_default_of_64_gpus_is_of_the_size_that_is_known() -> None:
    for collective in COLLECTIVES:
        assert 30e-6 < default_latency("nccl", collective, 64, 8) < 100e-6


def test_a_measured_group_replaces_the_default_and_scales_it_for_other_sizes() -> None:
    times = CollectiveTimes("gloo", (MeasuredGroup("all_reduce", 4, 1, 1e-3, 1e9),))
    assert times.latency("all_reduce", 4) == pytest.approx(1e-3)
    growth = default_latency("gloo", "all_reduce", 16) / default_latency("gloo", "all_reduce", 4)
    assert times.latency("all_reduce", 16) == pytest.approx(1e-3 * growth)
    assert times.latency("all_to_all", 4) == default_latency("gloo", "all_to_all", 4)


def test_the_nearest_group_is_used_and_one_across_nodes_for_one_across_nodes() -> None:
    groups = (
        MeasuredGroup("all_to_all", 2, 1, 1e-4, 1e9),
        MeasuredGroup("all_to_all", 8, 1, 3e-4, 1e9),
        MeasuredGroup("all_to_all", 16, 2, 9e-4, 1e9),
    )
    times = CollectiveTimes("nccl", groups)
    assert times.nearest("all_to_all", 2, 1) is groups[0]
    assert times.nearest("all_to_all", 16, 1) is groups[1]
    assert times.nearest("all_to_all", 4, 4) is groups[2]
    assert times.nearest("all_reduce", 4, 1) is None
