"""Unsupported plans and state dicts of other widths are refused, with the table's name."""

from collections.abc import Callable

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingEnv2D, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, ExchangeChoice
from tests.helpers.ranks import RankPool
from tests.helpers.refused_batches import (
    build,
    make_bags,
    positive_module,
    tables_of_every_kind,
    to_kjt,
)

Ranks = Callable[[int], RankPool]


def _plan_of_t0(kind: str, sharder: MultiLayerEmbeddingBagCollectionSharder) -> EmbeddingModuleShardingPlan:
    shardings = {"table_wise": table_wise(rank=1), "column_wise": column_wise(ranks=[0, 1])}
    module = MultiLayerEmbeddingBagCollection(tables_of_every_kind(), device=torch.device("meta"))
    every = {table.name: row_wise() for table in tables_of_every_kind()} | {"t0": shardings.get(kind, row_wise())}
    plan = construct_module_sharding_plan(module, every, sharder, local_size=2, world_size=2, device_type="cpu")
    first, second = plan["t0"].sharding_spec.shards if kind in ("uneven", "swapped") else (None, None)
    if kind == "uneven":
        first.shard_sizes, second.shard_sizes, second.shard_offsets = [30, 8], [70, 8], [30, 0]
    elif kind == "swapped":
        first.shard_offsets, second.shard_offsets = second.shard_offsets, first.shard_offsets
    return plan


class _AnySharder(MultiLayerEmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise", "column_wise"]


def _shard_by(kind: str, exchange: ExchangeChoice) -> str | bool:
    sharder = _AnySharder(exchange=exchange)
    module = positive_module()
    apply_optimizer_in_backward(torch.optim.SGD, module.embedding_bags.parameters(), {"lr": 0.1})
    plan = _plan_of_t0(kind, sharder)
    try:
        sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"))
    except ValueError as error:
        return str(error)
    batch = to_kjt(make_bags(0, dist.get_rank()))
    expected = positive_module()(batch).to_dict()
    model = DistributedModelParallel(
        torch.nn.Sequential(module),
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"0": _plan_of_t0(kind, sharder)}),
        sharders=[sharder],
    )
    found = model(batch).to_dict()
    return all(torch.allclose(found[name], values, rtol=1e-5, atol=1e-6) for name, values in expected.items())


@pytest.mark.multirank
@pytest.mark.parametrize("exchange", ["auto", *EXCHANGES])
def test_a_plan_that_an_exchange_does_not_support_is_refused(ranks: Ranks, exchange: ExchangeChoice) -> None:
    expected: str | bool = True
    if exchange == "unique_rows":
        requires = "requires row_wise; use 'auto', 'after' or 'reduce_scatter'"
        expected = f"table 't0': the plan is table_wise, but exchange 'unique_rows' {requires}"
    assert ranks(2).run(_shard_by, "table_wise", exchange) == [expected] * 2
    columns = "table 't0': the plan is column_wise; multi-layer tables cannot be split by columns"
    assert ranks(2).run(_shard_by, "column_wise", exchange) == [columns] * 2
    # TorchRec's own routing would look up wrong rows without an error.
    starts = "row shards start at rows [0, 30]; with 2 ranks they must be blocks of 50 rows"
    assert ranks(2).run(_shard_by, "uneven", exchange) == [f"table 't0': the plan's {starts}"] * 2
    # The sharder places blocks as the exchange requires, so a plan can be used again.
    assert ranks(2).run(_shard_by, "swapped", exchange) == [True] * 2


def _load_wrong_shapes(name: str) -> list[str]:
    wide = [
        MultiLayerEmbeddingBagConfig(
            name="t0", num_embeddings=100, embedding_dim=4, hidden_dim=16, feature_names=["f0"]
        )
    ]
    other = MultiLayerEmbeddingBagCollection(wide).state_dict()
    model, _ = build("auto")
    messages = []
    for module in (model.module.embeddings, positive_module()):
        state = module.state_dict()
        for names in ([name], list(other)):
            with pytest.raises(ValueError, match=r"^table 't0'") as raised:
                module.load_state_dict(state | {each: other[each] for each in names})
            messages.append(str(raised.value))
        module.load_state_dict(state)
    return messages


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedding_bags.t0.weight", "table 't0': W1 has 16 columns and W2 has 8 rows"),
        ("projections.t0.weight", "table 't0': W1 has 8 columns and W2 has 16 rows"),
    ],
)
def test_a_state_dict_of_two_widths_is_refused_with_the_tables_name(ranks: Ranks, name: str, message: str) -> None:
    both = "table 't0': W1 is (100, 16) in the state and (100, 8) in the module"
    assert ranks(2).run(_load_wrong_shapes, name) == [[message, both, message, both]] * 2


def _load_sharded(world_size: int) -> str:
    sharder = MultiLayerEmbeddingBagCollectionSharder()
    states = []
    for width in (8, 16):
        table = MultiLayerEmbeddingBagConfig(
            name="t0", num_embeddings=100, embedding_dim=4, hidden_dim=width, feature_names=["f0"]
        )
        module = MultiLayerEmbeddingBagCollection([table], device=torch.device("meta"))
        plan = construct_module_sharding_plan(
            module, {"t0": row_wise()}, sharder, local_size=world_size, world_size=world_size, device_type="cpu"
        )
        sharded = sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"))
        states.append(sharded.state_dict())
    name = "embedding_bags.t0.weight"
    with pytest.raises(ValueError, match="table 't0'") as raised:
        sharded.load_state_dict(states[1] | {name: states[0][name]})
    sharded.load_state_dict(states[1])
    return str(raised.value)


@pytest.mark.multirank
def test_sharded_tensors_of_another_width_are_refused_with_the_tables_name(ranks: Ranks) -> None:
    assert ranks(2).run(_load_sharded, 2) == ["table 't0': W1 has 8 columns and W2 has 16 rows"] * 2


def test_2d_sharding_is_refused() -> None:
    module = MultiLayerEmbeddingBagCollection(tables_of_every_kind(), device=torch.device("meta"))
    env = ShardingEnv2D.__new__(ShardingEnv2D)
    with pytest.raises(ValueError, match="cannot be sharded in 2D"):
        MultiLayerEmbeddingBagCollectionSharder().shard(module, {}, env)
