"""Tables with row ranges against the dense float64 reference, on 1 to 4 ranks."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.table_config import RowRange
from tests.helpers.dense_reference import Bags, DenseReference, Table, toy_loss
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
STEPS, GLOBAL_BATCH = 4, 12


def _table(
    name: str,
    ranges: list[tuple[int, int]],
    features: list[str],
    pooling: PoolingType = PoolingType.SUM,
    shared_row: bool = False,
) -> MultiLayerEmbeddingBagConfig:
    return MultiLayerEmbeddingBagConfig(
        name=name,
        num_embeddings=sum(rows for rows, _ in ranges),
        embedding_dim=4,
        hidden_dim=16,
        feature_names=features,
        pooling=pooling,
        row_ranges=[RowRange(*each) for each in ranges],
        shared_row=shared_row,
    )


def _tables() -> list[MultiLayerEmbeddingBagConfig]:
    return [
        _table("staircase", [(3, 16), (10, 8), (20, 4), (30, 0)], ["f0", "f1"]),
        _table("hole", [(5, 8), (4, 0), (7, 4), (2, 16)], ["f2"]),
        _table("averaged", [(2, 16), (9, 0)], ["f3", "f0"], PoolingType.MEAN),
        _table("shared", [(3, 8), (5, 4), (1, 4), (40, 0)], ["f7", "f0"], shared_row=True),
        _table("shared_narrow", [(4, 16), (11, 0)], ["f8"], PoolingType.MEAN, shared_row=True),
        _table("first_missing", [(4, 0), (6, 4)], ["f4"]),
        MultiLayerEmbeddingBagConfig(
            name="whole", num_embeddings=33, embedding_dim=4, hidden_dim=12, feature_names=["f5", "f2"]
        ),
        MultiLayerEmbeddingBagConfig(name="single", num_embeddings=20, embedding_dim=4, feature_names=["f6"]),
    ]


def _bags(seed: int, weighted: bool) -> Bags:
    draw = random.Random(seed)
    sizes: dict[str, int] = {}
    for table in _tables():
        for feature in table.feature_names:
            sizes[feature] = min(table.num_embeddings, sizes.get(feature, table.num_embeddings))

    def entry(n: int) -> tuple[int, float]:
        return draw.randrange(n), draw.uniform(0.5, 2.0) if weighted else 1.0

    longest = 1 if seed == 3 and not weighted else 4  # one id per bag is a path of its own
    shortest = longest if longest == 1 else 0
    return {
        name: [[entry(n) for _ in range(draw.randint(shortest, longest))] for _ in range(GLOBAL_BATCH)]
        for name, n in sizes.items()
    }


def _module(weighted: bool) -> MultiLayerEmbeddingBagCollection:
    return make_positive(MultiLayerEmbeddingBagCollection(_tables(), is_weighted=weighted, seed=11))


def _train(optimizer: str, weighted: bool) -> dict[str, Any]:
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    model = shard(_module(weighted), optimizer, exchange="unique_rows")
    stepper, outputs = optimizer_of(model, optimizer, RATES), []
    for step in range(STEPS):
        stepper.zero_grad()
        found = model(to_kjt(_bags(step, weighted), rank * share, (rank + 1) * share, weighted)).to_dict()
        toy_loss(found).backward()
        stepper.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    return {"outputs": outputs, "weights": full_weights(model)}


def _parts(tables: list[Table]) -> dict[str, Table]:
    return {part.name: part for table in tables for _, part in table.stored}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("world_size", "weighted"), [(1, True), (2, False), (3, True), (4, False)])
def test_outputs_and_weights_equal_the_dense_reference(
    ranks: Ranks, world_size: int, weighted: bool, optimizer: str
) -> None:
    by_rank = ranks(world_size).run(_train, optimizer, weighted)
    module = _module(weighted)
    reference = DenseReference(dense_tables(module), optimizer, RATES)
    for step in range(STEPS):
        for feature, values in reference.step(_bags(step, weighted)).items():
            found = torch.cat([result["outputs"][step][feature] for result in by_rank])
            torch.testing.assert_close(found.double(), values, rtol=2e-5, atol=2e-6)
    parts = _parts(reference.tables)
    for table in module.row_tables():
        for segment in segments_of([table]):
            part = parts[segment.name]
            for result in by_rank:
                pool = result["weights"][f"embedding_bags.{table.name}.weight"]
                rows = pool[segment.offset : segment.offset + segment.rows]
                torch.testing.assert_close(rows.double(), part.rows.detach(), rtol=2e-5, atol=2e-6)
                if part.projection is not None:
                    found = result["weights"][f"projections.{segment.name}.weight"]
                    torch.testing.assert_close(found.double(), part.projection.detach(), rtol=2e-5, atol=2e-6)


def _initial() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    meta = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=5)
    unsharded = MultiLayerEmbeddingBagCollection(_tables(), seed=5)
    return full_weights(shard(meta, exchange="unique_rows")), unsharded_weights(unsharded)


@pytest.mark.parametrize("world_size", [2, 3])
def test_initial_values_do_not_depend_on_the_ranks(ranks: Ranks, world_size: int) -> None:
    for found, expected in ranks(world_size).run(_initial):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize("weighted", [False, True])
def test_the_unsharded_module_and_the_collapsed_tables_equal_the_dense_reference(weighted: bool) -> None:
    module = _module(weighted)
    expected = DenseReference(dense_tables(module), "sgd", RATES).forward(bags := _bags(0, weighted))
    batch = to_kjt(bags, 0, GLOBAL_BATCH, weighted)
    found = module(batch).to_dict()
    assert list(found) == [
        *("f0@staircase", "f1", "f2@hole", "f3", "f0@averaged", "f7", "f0@shared", "f8", "f4", "f5", "f2@whole", "f6")
    ]
    for feature, values in expected.items():
        torch.testing.assert_close(found[feature].double(), values, rtol=2e-5, atol=2e-6)
    plain = module.collapse()
    for table, reference in zip(plain.embedding_bag_configs(), dense_tables(module), strict=True):
        rows = plain.embedding_bags[table.name].weight
        torch.testing.assert_close(rows, reference.product(4).float(), rtol=1e-5, atol=1e-6)
    assert not plain.embedding_bags["staircase"].weight[33:].any()


def _refused(exchange: str) -> None:
    shard(_module(False), exchange=exchange)  # type: ignore[arg-type]


@pytest.mark.parametrize("exchange", ["after", "reduce_scatter"])
def test_other_exchanges_are_refused(ranks: Ranks, exchange: str) -> None:
    with pytest.raises(RankFailed, match=r"table 'staircase' has row ranges, whose vectors only exchange unique_rows"):
        ranks(2).run(_refused, exchange)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(3, 8), (4, 4)], "row ranges have 7 rows, and num_embeddings is 8"),
        ([(8, 0)], "no row range has a width above 0"),
        ([(0, 8), (8, 4)], "row range 0 has 0 rows of width 8"),
        ([(8, -4)], "row range 0 has 8 rows of width -4"),
    ],
)
def test_invalid_ranges_are_refused(ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"table 't'.*{message}"):
        MultiLayerEmbeddingBagConfig(name="t", num_embeddings=8, embedding_dim=4, row_ranges=ranges)  # type: ignore[arg-type]


def test_tables_with_the_same_name_are_refused() -> None:
    plain = MultiLayerEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])
    with pytest.raises(ValueError, match="table 't': 2 tables have this name"):
        MultiLayerEmbeddingBagCollection([plain, plain], device=torch.device("meta"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("staircase:1", "is also the name of a row range of another table"), ("rows_8x4", "is also the name of a pool")],
)
def test_names_that_stand_for_something_else_are_refused(name: str, message: str) -> None:
    plain = MultiLayerEmbeddingBagConfig(name=name, num_embeddings=9, embedding_dim=4, feature_names=["f7"])
    with pytest.raises(ValueError, match=f"table '{name}': {message}"):
        MultiLayerEmbeddingBagCollection([*_tables(), plain], device=torch.device("meta"))
