"""The pruning of the planner's options, with hand-made times and sizes."""

import torch
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from mlet_dist.embeddings.planning.search_space import prune_options

KINDS = {"row_wise": "uniform", "data_parallel": "uniform", "table_wise": "device", "table_row_wise": "host"}


def _option(table: str, kind: str, ranks: int, time: float, size: int = 1, kernel: str = "fused") -> ShardingOption:
    perf, storage = Perf(fwd_compute=time, fwd_comms=0, bwd_compute=0, bwd_comms=0), Storage(hbm=size, ddr=0)
    return ShardingOption(
        name=table,
        tensor=torch.empty(8, 4, device="meta"),
        module=("", torch.nn.Module()),
        input_lengths=[1.0],
        batch_size=1,
        sharding_type=kind,
        partition_by=KINDS[kind],
        compute_kernel=kernel,
        shards=[Shard(size=[1, 4], offset=[rank, 0], perf=perf, storage=storage) for rank in range(ranks)],
    )


def _kept(*options: ShardingOption) -> list[tuple[str, str, str]]:
    return [(each.name, each.sharding_type, each.compute_kernel) for each in prune_options(options)]


def test_a_slower_even_option_is_kept_if_it_needs_less_memory() -> None:
    rows, copies = _option("a", "row_wise", 4, time=2, size=1), _option("a", "data_parallel", 4, time=1, size=4)
    assert _kept(rows, copies) == [("a", "row_wise", "fused"), ("a", "data_parallel", "fused")]
    slow_copies = _option("a", "data_parallel", 4, time=3, size=4)
    assert _kept(rows, slow_copies) == [("a", "row_wise", "fused")]


def test_an_uneven_option_must_save_half_of_the_work() -> None:
    rows, other = _option("a", "row_wise", 4, time=2), _option("b", "row_wise", 4, time=9)
    assert ("a", "table_wise", "fused") in _kept(rows, other, _option("a", "table_wise", 1, time=4))
    assert ("a", "table_wise", "fused") not in _kept(rows, other, _option("a", "table_wise", 1, time=4.1))
    assert ("a", "table_row_wise", "fused") in _kept(rows, other, _option("a", "table_row_wise", 2, time=2))


def test_no_option_may_take_longer_than_the_best_even_plan() -> None:
    rows, other = _option("a", "row_wise", 64, time=2), _option("b", "row_wise", 64, time=1)
    assert ("a", "table_wise", "fused") in _kept(rows, other, _option("a", "table_wise", 1, time=3))
    assert ("a", "table_wise", "fused") not in _kept(rows, other, _option("a", "table_wise", 1, time=3.1))
    # If a table has no even option, there is no even plan.
    alone = _option("b", "table_wise", 1, time=1)
    assert ("a", "table_wise", "fused") in _kept(rows, alone, _option("a", "table_wise", 1, time=3.1))


def test_slower_kernels_with_rows_in_host_memory_are_kept() -> None:
    fused, cached = _option("a", "row_wise", 2, time=1), _option("a", "row_wise", 2, time=9, kernel="fused_uvm_caching")
    assert _kept(fused, cached) == [("a", "row_wise", "fused"), ("a", "row_wise", "fused_uvm_caching")]


def test_differences_below_a_launch_choose_nothing() -> None:
    rows, copies = _option("a", "row_wise", 4, time=2, size=1), _option("a", "data_parallel", 4, time=1.9, size=4)
    kept = [(each.name, each.sharding_type) for each in prune_options([rows, copies], launch=0.2)]
    assert kept == [("a", "row_wise")]  # of equal options the one with less memory
    kept = [(each.name, each.sharding_type) for each in prune_options([rows, copies], launch=0.05)]
    assert kept == [("a", "row_wise"), ("a", "data_parallel")]


def test_a_type_must_save_more_than_its_collectives_take() -> None:
    options = [_option(table, "row_wise", 4, time=2) for table in "abc"]
    options += [_option(table, "table_wise", 1, time=2) for table in "abc"]
    # Each table saves (4·2 - 2) / 4 = 1.5 a rank.
    for latency, kept in ((4.4, 6), (4.6, 3)):
        assert len(prune_options(options, added={"table_wise": latency})) == kept
