"""The sharded module against the dense float64 reference, on 1, 2, 3 and 4 ranks."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig, projection
from mlet_dist.embeddings.sharded import collectives, row_lookup, row_shardings, unique_rows
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, Exchange
from mlet_dist.embeddings.sharded.row_lookup import group_for_rows
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.pairwise import pairwise
from tests.helpers.ranks import RankFailed, RankPool
from tests.helpers.sharded_module import (
    OPTIMIZERS,
    dense_tables,
    full_weights,
    make_positive,
    optimizer_of,
    shard,
    to_kjt,
    unsharded_weights,
)

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]
RATES = {"rows": 0.05, "projections": 0.02}
SEED = 11
STEPS = 4
GLOBAL_BATCH = 12


def _tables() -> list[EmbeddingBagConfig]:
    def table(
        name: str, n: int, k: int | None, features: list[str], pooling: PoolingType = PoolingType.SUM
    ) -> MultiLayerEmbeddingBagConfig:
        return MultiLayerEmbeddingBagConfig(
            name=name, num_embeddings=n, embedding_dim=4, hidden_dim=k, feature_names=features, pooling=pooling
        )

    return [
        table("uneven", 101, 16, ["f0"]),
        table("tiny", 5, 16, ["f1"]),  # the last of 4 ranks would hold no row
        table("two_rows", 2, 16, ["f2"]),  # fewer rows than ranks
        table("single_layer", 50, None, ["f3"]),
        table("square", 30, 4, ["f10"]),  # W1 is as wide as the single layer, but there is a W2
        table("shared", 33, 8, ["f4", "f5"]),
        table("averaged", 40, 8, ["f6"], PoolingType.MEAN),
        table("tiny_averaged", 3, 8, ["f8"], PoolingType.MEAN),  # replicated on 4 ranks
        # One feature in four tables, with sum and mean pooling, one of them replicated on 3 and 4 ranks.
        table("wide", 60, 8, ["f9"]),
        table("wide_too", 60, None, ["f9"]),
        table("deep", 60, 12, ["f9"], PoolingType.MEAN),
        table("deep_tiny", 2, 8, ["f9"], PoolingType.MEAN),
        EmbeddingBagConfig(name="plain", num_embeddings=20, embedding_dim=4, feature_names=["f7"]),
    ]


def _make_bags(seed: int, weighted: bool = False, rows: int = GLOBAL_BATCH) -> Bags:
    """Draw bags of 0 to 5 ids with repeats; the first row of every batch has an empty bag in f0 and in f9.

    Every second batch has no id of a table's last row, which the optimizer must then not update.
    """
    draw = random.Random(seed)
    sizes: dict[str, int] = {}
    for table in _tables():
        for feature in table.feature_names:
            sizes[feature] = min(table.num_embeddings, sizes.get(feature, table.num_embeddings))

    def entry(n: int) -> tuple[int, float]:
        return draw.randrange(max(1, n - seed % 2)), draw.uniform(0.5, 2.0) if weighted else 1.0

    bags = {name: [[entry(n) for _ in range(draw.randint(0, 5))] for _ in range(rows)] for name, n in sizes.items()}
    bags["f0"][0] = bags["f9"][0] = []
    bags["f0"][1] = [entry(1), (7, 1.0), (7, 1.0)]
    return bags


def _positive_module(weighted: bool = False) -> MultiLayerEmbeddingBagCollection:
    return make_positive(MultiLayerEmbeddingBagCollection(_tables(), is_weighted=weighted, seed=SEED))


def _train_sharded(
    name: str, weighted: bool = False, exchange: Exchange = "after", factors: Sequence[float] = STEPS * (1.0,)
) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = shard(_positive_module(weighted), name, exchange=exchange)
    initial = full_weights(model)
    optimizer = optimizer_of(model, name, RATES)
    schedule = LambdaLR(optimizer, lambda done: factors[min(done, STEPS - 1)])
    share = GLOBAL_BATCH // world_size
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = model(to_kjt(_make_bags(step, weighted), rank * share, (rank + 1) * share, weighted)).to_dict()
        toy_loss(found).backward()
        optimizer.step()
        schedule.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    plan = next(iter(model.plan.plan.values()))
    return {
        "initial": initial,
        "outputs": outputs,
        "weights": full_weights(model),
        "sharding": {name: sharding.sharding_type for name, sharding in plan.items()},
    }


def _reference(optimizer: str) -> DenseReference:
    return DenseReference(dense_tables(_positive_module()), optimizer, RATES)


def _assert_equal_reference(
    by_rank: list[dict[str, Any]], optimizer: str, weighted: bool, factors: Sequence[float] = STEPS * (1.0,)
) -> None:
    reference = _reference(optimizer)
    for step in range(STEPS):
        expected = reference.step(_make_bags(step, weighted), factors[step])
        for feature, values in expected.items():
            found = torch.cat([result["outputs"][step][feature] for result in by_rank])
            torch.testing.assert_close(found.double(), values, rtol=2e-5, atol=2e-6)
    for table in reference.tables:
        for result in by_rank:
            weights = result["weights"]
            torch.testing.assert_close(
                weights[f"embedding_bags.{table.name}.weight"].double(), table.rows.detach(), rtol=2e-5, atol=2e-6
            )
            if table.projection is not None:
                torch.testing.assert_close(
                    weights[f"projections.{table.name}.weight"].double(),
                    table.projection.detach(),
                    rtol=2e-5,
                    atol=2e-6,
                )


@pytest.mark.parametrize(
    ("ranks_and_weights", "optimizer", "exchange"),
    pairwise([(1, True), (2, False), (2, True), (3, False), (4, True)], OPTIMIZERS, EXCHANGES),
)
def test_outputs_and_weights_equal_the_dense_reference(
    ranks: Ranks, ranks_and_weights: tuple[int, bool], optimizer: str, exchange: Exchange
) -> None:
    world_size, weighted = ranks_and_weights
    by_rank = ranks(world_size).run(_train_sharded, optimizer, weighted, exchange)
    _assert_equal_reference(by_rank, optimizer, weighted)


def _train_as_on_cuda(optimizer: str) -> dict[str, Any]:
    def group(*args: Any, unpooled: bool) -> list[GroupedEmbeddingConfig]:
        assert not unpooled
        return group_for_rows(*args, unpooled=True)

    with (
        mock.patch.object(row_shardings, "group_for_rows", group),
        mock.patch.object(unique_rows, "project_tables", projection._project_in_batches),
        mock.patch.object(projection, "project_rows", projection._project_padded),
    ):
        return _train_sharded(optimizer, False, "unique_rows")


def _train_averaging_partial_gradients(exchange: Exchange) -> dict[str, Any]:
    def averaged(tables: Collection[str], *_: object) -> dict[str, float]:
        return dict.fromkeys(tables, 1 / dist.get_world_size())

    with mock.patch.object(collectives, "gradient_factors", averaged):
        return _train_sharded("sgd", False, exchange)


@pytest.mark.parametrize("exchange", ["reduce_scatter", "unique_rows"])
def test_the_reference_detects_averaged_partial_gradients(ranks: Ranks, exchange: Exchange) -> None:
    by_rank = ranks(2).run(_train_averaging_partial_gradients, exchange)
    with pytest.raises(AssertionError, match="not close"):
        _assert_equal_reference(by_rank, "sgd", False)


def _train_with_kernels_apart(optimizer: str) -> dict[str, Any]:
    # With 12 rows per batch, the tables of width 4 share a kernel, and each wider one has its own.
    with mock.patch.object(row_lookup, "PADDED_BYTES", 12 * 4 * 4):
        return _train_sharded(optimizer, False, "unique_rows")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_kernel_for_each_large_table_equals_the_dense_reference(ranks: Ranks, optimizer: str) -> None:
    _assert_equal_reference(ranks(2).run(_train_with_kernels_apart, optimizer), optimizer, False)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])  # fbgemm's CPU has no fused Adam
def test_the_unpooled_kernels_used_on_cuda_equal_the_dense_reference(ranks: Ranks, optimizer: str) -> None:
    _assert_equal_reference(ranks(2).run(_train_as_on_cuda, optimizer), optimizer, False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_schedule_applies_to_every_weight_in_every_step(ranks: Ranks, optimizer: str) -> None:
    factors = (0.25, 1.0, 0.5, 0.75)
    by_rank = ranks(2).run(_train_sharded, optimizer, False, "unique_rows", factors)
    _assert_equal_reference(by_rank, optimizer, False, factors)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_projections_are_bitwise_identical_on_all_ranks(ranks: Ranks, world_size: int, exchange: Exchange) -> None:
    first, *others = ranks(world_size).run(_train_sharded, "adagrad", False, exchange)
    projections = [name for name in first["weights"] if name.startswith("projections.")]
    assert len(projections) == 10
    for name in projections:
        assert not torch.equal(first["weights"][name], first["initial"][name])
        for other in others:
            assert torch.equal(first["weights"][name], other["weights"][name])


def _initial_weights() -> dict[str, torch.Tensor]:
    module = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=SEED)
    return full_weights(shard(module))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_initial_values_do_not_depend_on_the_number_of_ranks(ranks: Ranks, world_size: int) -> None:
    unsharded = unsharded_weights(MultiLayerEmbeddingBagCollection(_tables(), seed=SEED))
    for initial in ranks(world_size).run(_initial_weights):
        assert set(initial) == set(unsharded)
        for name, tensor in unsharded.items():
            assert torch.equal(initial[name], tensor), name


def test_tables_with_too_few_rows_stay_data_parallel(ranks: Ranks) -> None:
    expected = {
        1: set(),
        2: set(),
        3: {"two_rows", "deep_tiny"},
        4: {"two_rows", "deep_tiny", "tiny", "tiny_averaged"},
    }
    for world_size, kept in expected.items():
        sharding = ranks(world_size).run(_train_sharded, "sgd")[0]["sharding"]
        assert {name for name, kind in sharding.items() if kind == "data_parallel"} == kept
        assert {name for name, kind in sharding.items() if kind == "row_wise"} == set(sharding) - kept


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_values_of_a_module_that_is_not_on_meta_are_copied(ranks: Ranks, world_size: int) -> None:
    expected = unsharded_weights(_positive_module())
    for result in ranks(world_size).run(_train_sharded, "sgd"):
        assert set(result["initial"]) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(result["initial"][name], tensor), name


def _shard_filled_after_meta() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    module = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta")).to_empty(device="cpu")
    module.load_state_dict(_positive_module().state_dict())
    return unsharded_weights(module), full_weights(shard(module))


def test_the_values_of_a_module_filled_after_it_was_built_on_meta_are_copied(ranks: Ranks) -> None:
    expected, found = ranks(2).run(_shard_filled_after_meta)[0]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@torch.fx.wrap
def _loss_and_output(pooled: KeyedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = pooled.to_dict()
    return toy_loss(found), torch.cat(list(found.values()), dim=1).detach()


class _Tensors(torch.nn.Module):
    """A model that maps a batch to a loss and outputs, as TorchRec's pipelines require."""

    def __init__(self, embeddings: MultiLayerEmbeddingBagCollection) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _loss_and_output(self.embeddings(features))


def _train_with(pipelined: bool, exchange: Exchange) -> dict[str, torch.Tensor]:
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    batches = [to_kjt(_make_bags(step), rank * share, (rank + 1) * share) for step in range(STEPS)]
    model = shard(_positive_module(), exchange=exchange, around=_Tensors)
    optimizer = optimizer_of(model, "sgd", RATES)
    schedule = LambdaLR(optimizer, lambda done: 1 / (1 + done))
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    iterator = iter(batches)
    for batch in batches:
        if pipelined:
            pipeline.progress(iterator)
        else:
            optimizer.zero_grad()
            model(batch)[0].backward()
            optimizer.step()
        schedule.step()
    return full_weights(model)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_training_in_torchrecs_pipeline_is_bitwise_identical(ranks: Ranks, exchange: Exchange) -> None:
    plain, pipelined = (ranks(2).run(_train_with, each, exchange)[0] for each in (False, True))
    assert len(plain) == 13 + 10
    for name, tensor in plain.items():
        assert torch.equal(pipelined[name], tensor), name


def _weights_from_different_seeds() -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    tables = [
        MultiLayerEmbeddingBagConfig(
            name=f"t{n}",
            num_embeddings=n,
            embedding_dim=4,
            hidden_dim=8,
            feature_names=["f"],
            init_fn=torch.nn.init.normal_,
        )
        for n in (1, 40)
    ]
    return full_weights(shard(MultiLayerEmbeddingBagCollection(tables)))


def test_replicated_weights_start_as_those_of_the_first_rank(ranks: Ranks) -> None:
    first, second = ranks(2).run(_weights_from_different_seeds)
    assert len(first) == 4
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def _shard_width(hidden_dim: int | None, embedding_dim: int) -> None:
    table = MultiLayerEmbeddingBagConfig(
        name="odd", num_embeddings=9, embedding_dim=embedding_dim, hidden_dim=hidden_dim, feature_names=["f"]
    )
    shard(MultiLayerEmbeddingBagCollection([table], device=torch.device("meta")))


def test_a_width_that_fbgemm_does_not_support_is_refused(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="table 'odd': hidden_dim is 9"):
        ranks(1).run(_shard_width, 9, 4)
    with pytest.raises(RankFailed, match="table 'odd': embedding_dim is 6"):
        ranks(1).run(_shard_width, None, 6)
    ranks(1).run(_shard_width, 8, 6)


def _outputs_served_and_trained() -> tuple[torch.Tensor, torch.Tensor]:
    module = MultiLayerEmbeddingBagCollection(_tables(), seed=SEED)
    served = EmbeddingBagCollection([table.plain_config() for table in module.embedding_bag_configs()])
    served.load_state_dict(module.collapse().state_dict())
    model = shard(MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=SEED))
    features = to_kjt(_make_bags(3), 0, GLOBAL_BATCH)
    expected, found = served(features).to_dict(), model(features).to_dict()
    assert len(expected) == 14
    return tuple(torch.cat([each[name].detach() for name in expected], dim=1) for each in (expected, found))


def test_the_collapsed_collection_returns_the_vectors_of_the_sharded_one(ranks: Ranks) -> None:
    for expected, found in ranks(2).run(_outputs_served_and_trained):
        assert expected.shape == (GLOBAL_BATCH, 14 * 4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
