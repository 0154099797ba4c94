"""All sharding types in one model against the dense float64 reference; 4 ranks are 2 nodes of 2."""

import random
from collections.abc import Callable, Collection
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded import collectives
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import (
    dense_tables,
    full_weights,
    make_positive,
    optimizer_of,
    shard,
    to_kjt,
)

pytestmark = pytest.mark.multirank

Ranks = Callable[..., RankPool]
RATES = {"rows": 0.05, "projections": 0.02}
STEPS, GLOBAL_BATCH = 4, 12
NODES = [(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]
EXCHANGES: tuple[ExchangeChoice, ...] = ("auto", "after", "reduce_scatter")

SIZES = {  # n, k, sharding type; tables of the same type need not be adjacent
    "rows": (101, 16, "row_wise"),
    "owned": (80, 16, "table_wise"),
    "node": (61, 16, "table_row_wise"),
    "copied": (30, 16, "data_parallel"),
    "owned_plain": (40, None, "table_wise"),
    "node_plain": (41, None, "table_row_wise"),
    "copied_plain": (7, None, "data_parallel"),
    "owned_small": (2, 8, "table_wise"),
    "owned_mean": (50, 8, "table_wise"),
    "node_mean": (51, 8, "table_row_wise"),
    "node_one": (1, 8, "table_row_wise"),  # too few rows for a node of two
    "rows_too": (33, 12, "row_wise"),
}
TYPES = {name: kind for name, (_, _, kind) in SIZES.items()}


def _tables() -> list[MultiLayerEmbeddingBagConfig]:
    """Return tables with one feature each, and the feature ``both`` in four of them."""
    return [
        MultiLayerEmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=4,
            hidden_dim=hidden_dim,
            feature_names=[f"f_{name}"] + (["both"] if name in ("rows", "owned", "node", "copied") else []),
            pooling=PoolingType.MEAN if name.endswith("mean") else PoolingType.SUM,
        )
        for name, (rows, hidden_dim, _) in SIZES.items()
    ]


def _module(weighted: bool = False) -> MultiLayerEmbeddingBagCollection:
    return make_positive(MultiLayerEmbeddingBagCollection(_tables(), is_weighted=weighted, seed=3))


def _bags(step: int, weighted: bool) -> Bags:
    draw = random.Random(step)
    limits = {f"f_{name}": rows for name, (rows, _, _) in SIZES.items()} | {"both": 30}

    def entry(limit: int) -> tuple[int, float]:
        return draw.randrange(limit), draw.uniform(0.5, 2.0) if weighted else 1.0

    return {
        name: [[entry(limit) for _ in range(draw.randint(0, 4))] for _ in range(GLOBAL_BATCH)]
        for name, limit in limits.items()
    }


def _shares(unequal: bool) -> tuple[int, int]:
    """Return this rank's range of the global batch; of unequal shares the first is empty and the last the largest."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = GLOBAL_BATCH // world_size
    if not unequal:
        return rank * share, (rank + 1) * share
    bounds = [0, 0, *range(1, world_size - 1), GLOBAL_BATCH]
    return bounds[rank], bounds[rank + 1]


def _train(
    optimizer: str,
    exchange: ExchangeChoice,
    weighted: bool = False,
    types: dict[str, str] = TYPES,
    unequal: bool = False,
) -> dict[str, Any]:
    model = shard(_module(weighted), optimizer, exchange=exchange, sharding_types=types)
    stepper = optimizer_of(model, optimizer, RATES)
    begin, end = _shares(unequal)
    outputs = []
    for step in range(STEPS):
        stepper.zero_grad()
        found = model(to_kjt(_bags(step, weighted), begin, end, weighted)).to_dict()
        # This factor makes the mean of the ranks' losses that of the global batch.
        loss = toy_loss(found) if begin < end else sum(each.sum() for each in found.values())
        (loss * (end - begin) * dist.get_world_size() / GLOBAL_BATCH).backward()
        stepper.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    plan = next(iter(model.plan.plan.values()))
    return {
        "outputs": outputs,
        "weights": full_weights(model),
        "types": {name: sharding.sharding_type for name, sharding in plan.items()},
        "ranks": {name: sharding.ranks for name, sharding in plan.items()},
    }


def _assert_equal_reference(by_rank: list[dict[str, Any]], optimizer: str, weighted: bool) -> None:
    reference = DenseReference(dense_tables(_module(weighted)), optimizer, RATES)
    for step in range(STEPS):
        for feature, values in reference.step(_bags(step, weighted)).items():
            found = torch.cat([result["outputs"][step][feature] for result in by_rank])
            torch.testing.assert_close(found.double(), values, rtol=2e-5, atol=2e-6)
    for table in reference.tables:
        for result in by_rank:
            rows = result["weights"][f"embedding_bags.{table.name}.weight"]
            torch.testing.assert_close(rows.double(), table.rows.detach(), rtol=2e-5, atol=2e-6)
            if table.projection is not None:
                second = result["weights"][f"projections.{table.name}.weight"]
                assert torch.equal(second, by_rank[0]["weights"][f"projections.{table.name}.weight"])
                torch.testing.assert_close(second.double(), table.projection.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("nodes", "optimizer", "exchange"),
    [
        *((nodes, "rowwise_adagrad", exchange) for nodes in NODES[:-1] for exchange in EXCHANGES),
        (NODES[-1], "rowwise_adagrad", "auto"),
        *(((4, 2), *each) for each in zip(("sgd", "adagrad", "adam"), EXCHANGES, strict=True)),
    ],
)
def test_all_types_in_one_model_equal_the_dense_reference(
    ranks: Ranks, nodes: tuple[int, int], exchange: ExchangeChoice, optimizer: str
) -> None:
    by_rank = ranks(*nodes).run(_train, optimizer, exchange, exchange == "auto")
    _assert_equal_reference(by_rank, optimizer, exchange == "auto")
    small = {"node_one"} if nodes[1] > 1 else set()
    small |= {"copied_plain"} if nodes[0] > 1 else set()
    for name, kind in TYPES.items():
        assert by_rank[0]["types"][name] == ("data_parallel" if name in small else kind), name


@pytest.mark.parametrize("kind", ["table_wise", "table_row_wise", "data_parallel"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_all_tables_of_one_type_equal_the_dense_reference(ranks: Ranks, kind: str, exchange: ExchangeChoice) -> None:
    by_rank = ranks(4, 2).run(_train, "adagrad", exchange, False, dict.fromkeys(TYPES, kind))
    _assert_equal_reference(by_rank, "adagrad", False)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("nodes", [(2, 2), (4, 2)])
def test_ranks_with_unequal_batches_and_none_equal_the_dense_reference(
    ranks: Ranks, nodes: tuple[int, int], exchange: ExchangeChoice
) -> None:
    by_rank = ranks(*nodes).run(_train, "adagrad", exchange, False, TYPES, True)
    _assert_equal_reference(by_rank, "adagrad", False)


@torch.fx.wrap
def _loss_and_output(pooled: KeyedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    return toy_loss(pooled.to_dict()), pooled.values().detach()


class _Tensors(torch.nn.Module):
    """A model that maps a batch to a loss and outputs, as TorchRec's pipelines require."""

    def __init__(self, embeddings: MultiLayerEmbeddingBagCollection) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _loss_and_output(self.embeddings(features))


def _train_with(pipelined: bool, exchange: ExchangeChoice) -> dict[str, torch.Tensor]:
    model = shard(_module(), exchange=exchange, around=_Tensors, sharding_types=TYPES)
    optimizer = optimizer_of(model, "sgd", RATES)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = [to_kjt(_bags(step, False), *_shares(False)) for step in range(STEPS)]
    iterator = iter(batches)
    for batch in batches:
        if pipelined:
            pipeline.progress(iterator)
        else:
            optimizer.zero_grad()
            model(batch)[0].backward()
            optimizer.step()
    return full_weights(model)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("nodes", [(2, 2), (4, 2)])
def test_training_in_torchrecs_pipeline_is_bitwise_identical(
    ranks: Ranks, nodes: tuple[int, int], exchange: ExchangeChoice
) -> None:
    plain, pipelined = (ranks(*nodes).run(_train_with, each, exchange)[0] for each in (False, True))
    assert len(plain) == len(SIZES) + 9
    for name, tensor in plain.items():
        assert torch.equal(pipelined[name], tensor), name


def _errors_under_autocast(exchange: ExchangeChoice) -> dict[str, torch.Tensor]:
    module, batch = _module(), to_kjt(_bags(0, False), *_shares(False))
    expected = {name: output.detach() for name, output in module(batch).to_dict().items()}
    model = shard(module, exchange=exchange, sharding_types=TYPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch).to_dict()
        loss = toy_loss(found)
    loss.backward()
    assert all(output.dtype == torch.float32 for output in found.values())
    return {name: (found[name].detach() - expected[name]).abs() / expected[name].clamp(min=1e-3) for name in expected}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_all_ranks_exchange_float32_under_autocast(ranks: Ranks, exchange: ExchangeChoice) -> None:
    # A rank whose tables have no W2, or that has no tables, computes nothing that autocast would round.
    for errors in ranks(4, 2).run(_errors_under_autocast, exchange):
        assert max(float(error.max()) for error in errors.values()) < 0.02


def _owned_by_one(rank: int) -> dict[str, Any]:
    # All tables are on one rank. The others apply no W2 before the exchange, but must take part in its all-reduce.
    with mock.patch.dict(SIZES, {"owned": SIZES["owned"]}, clear=True):
        return _train("sgd", "auto", False, {"owned": "table_wise"})


@pytest.mark.parametrize("nodes", [(2, 2), (4, 2)])
def test_ranks_without_tables_take_part(ranks: Ranks, nodes: tuple[int, int]) -> None:
    by_rank = ranks(*nodes).run(_owned_by_one, 0)
    assert len({tuple(result["ranks"]["owned"]) for result in by_rank}) == 1
    with mock.patch.dict(SIZES, {"owned": SIZES["owned"]}, clear=True):
        _assert_equal_reference(by_rank, "sgd", False)


def _train_averaging_partial_gradients() -> dict[str, Any]:
    def averaged(tables: Collection[str], *_: object) -> dict[str, float]:
        return dict.fromkeys(tables, 1 / dist.get_world_size())

    with mock.patch.object(collectives, "gradient_factors", averaged):
        return _train("sgd", "auto")


def test_the_reference_detects_averaged_partial_gradients(ranks: Ranks) -> None:
    by_rank = ranks(4, 2).run(_train_averaging_partial_gradients)
    with pytest.raises(AssertionError, match="not close"):
        _assert_equal_reference(by_rank, "sgd", False)
