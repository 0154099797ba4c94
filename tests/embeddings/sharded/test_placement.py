import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.types import ParameterSharding
from torchrec.optim import Adam, LarsSGD

from mlet_dist.embeddings import MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.placement import (
    check_moving_rows,
    check_node_placement,
    check_plan,
    check_widths,
    ranks_of_blocks,
    replicate_if_too_small,
    stagger_blocks,
)


def _plan(num_embeddings: int, world_size: int, width: int = 8) -> ParameterSharding:
    """Return a plan as TorchRec's planner makes it: block r is on rank r."""
    block = -(-num_embeddings // world_size)
    starts = [min(block * rank, num_embeddings) for rank in range(world_size)]
    shards = [
        ShardMetadata([start, 0], [min(block, num_embeddings - start), width], f"rank:{rank}/cpu")
        for rank, start in enumerate(starts)
    ]
    return ParameterSharding("row_wise", "fused", list(range(world_size)), EnumerableShardingSpec(shards))


def _first_rows(sharding: ParameterSharding) -> list[int]:
    """Return the first row on each rank."""
    assert sharding.sharding_spec is not None
    shards = sharding.sharding_spec.shards
    assert [shard.placement.rank() for shard in shards] == list(range(len(shards)))
    return [shard.shard_offsets[0] for shard in shards]


def test_first_blocks_are_on_different_ranks() -> None:
    plans = [_plan(100, 4), _plan(10, 4), _plan(8, 4), _plan(8, 4), _plan(8, 4)]
    stagger_blocks(plans)
    assert [_first_rows(plan) for plan in plans] == [
        [0, 25, 50, 75],
        [9, 0, 3, 6],
        [4, 6, 0, 2],
        [2, 4, 6, 0],
        [0, 2, 4, 6],
    ]
    assert plans[1].sharding_spec is not None
    assert [shard.shard_sizes for shard in plans[1].sharding_spec.shards] == [[1, 8], [3, 8], [3, 8], [3, 8]]


def test_staggering_twice_equals_staggering_once() -> None:
    plans = [_plan(64, 4) for _ in range(3)]
    stagger_blocks(plans)
    once = [_first_rows(plan) for plan in plans]
    stagger_blocks(plans)
    assert [_first_rows(plan) for plan in plans] == once


def test_ranks_of_staggered_blocks() -> None:
    plans = [_plan(10, 4) for _ in range(4)]
    stagger_blocks(plans)
    for index, plan in enumerate(plans):
        assert plan.sharding_spec is not None
        ranks = ranks_of_blocks(plan.sharding_spec.shards, 10)
        assert ranks == [(block + index) % 4 for block in range(4)]


def test_uneven_shards_are_refused() -> None:
    shards = [ShardMetadata([0, 0], [7, 8], "rank:0/cpu"), ShardMetadata([7, 0], [3, 8], "rank:1/cpu")]
    with pytest.raises(ValueError, match=r"start at rows \[0, 7\]; with 2 ranks they must be blocks of 5 rows"):
        ranks_of_blocks(shards, 10)


def test_the_last_of_many_ranks_may_own_no_rows() -> None:
    table = MultiLayerEmbeddingBagConfig(name="t", num_embeddings=10_000, embedding_dim=8, hidden_dim=512)
    for on_cpu in (False, True):
        plan = _plan(table.num_embeddings, 300, width=512)  # 20 MB, too large to be replicated; blocks of 34 rows
        assert plan.sharding_spec is not None
        assert plan.sharding_spec.shards[-1].shard_sizes[0] == 0
        replicate_if_too_small(table, plan, 300, on_cpu)
        assert plan.sharding_type == ("data_parallel" if on_cpu else "row_wise")
        if not on_cpu:
            check_plan(table, plan, "unique_rows", on_cpu=False)
            stagger_blocks([plan, plan])
            ranks = ranks_of_blocks(plan.sharding_spec.shards, table.num_embeddings)
            assert ranks[:295] == [(block + 1) % 300 for block in range(295)]
    table.hidden_dim = 8
    plan = _plan(table.num_embeddings, 300)
    replicate_if_too_small(table, plan, 300, on_cpu=False)
    assert plan.sharding_type == "data_parallel"


def test_a_plan_for_other_nodes_is_refused() -> None:
    plan = _plan(10, 2)
    plan.sharding_type = "table_row_wise"
    check_node_placement("t", plan, 2)
    with pytest.raises(
        ValueError, match=r"table 't': .* on ranks \[0, 1\]; with 4 ranks per node .* on \[0, 1, 2, 3\]"
    ):
        check_node_placement("t", plan, 4)


def test_rows_wider_than_fbgemms_cuda_kernels_are_refused_there() -> None:
    table = MultiLayerEmbeddingBagConfig(
        name="t", num_embeddings=9, embedding_dim=16, hidden_dim=2048, feature_names=["f"]
    )
    check_widths([table], torch.device("cuda"))
    table.hidden_dim = 2052
    check_widths([table], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"table 't': hidden_dim is 2052; fbgemm's CUDA kernels support at most 2048"):
        check_widths([table], torch.device("cuda"))
    table.hidden_dim = None
    check_widths([table], torch.device("cuda"))


def test_rows_move_with_some_optimizers_and_kernels_only() -> None:
    table = MultiLayerEmbeddingBagConfig(
        name="rows_8x4", num_embeddings=240, embedding_dim=4, hidden_dim=8, feature_names=["f"], num_buckets=24
    )
    plan = _plan(240, 2)
    for allowed in ([], [torch.optim.SGD], [torch.optim.Adagrad], [Adam]):
        check_moving_rows(table, plan, allowed)
    # Its state has the name of Adagrad's, but is a momentum.
    with pytest.raises(ValueError, match="'rows_8x4': rows that move between widths cannot have optimizer LarsSGD"):
        check_moving_rows(table, plan, [LarsSGD])
    for kernel in ("dense", "fused_uvm_caching"):
        plan.compute_kernel = kernel
        with pytest.raises(ValueError, match=f"cannot have kernel {kernel}; use fused or fused_uvm"):
            check_moving_rows(table, plan, [torch.optim.SGD])
    plan.compute_kernel = "dense"
    check_moving_rows(table, plan, [Adam])
