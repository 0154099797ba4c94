"""unique_rows tables of several k and d, which share their collectives, against the dense float64 reference."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec.modules.embedding_configs import PoolingType

from benchmarks.step_counters import count_step_operations
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.collectives import exchange_codecs
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

Ranks = Callable[[int], RankPool]
RATES = {"rows": 0.02, "projections": 0.01}
STEPS, ROWS = 3, 12
# k and d: three groups whose d have no common divisor above 2, in an order that TorchRec does not keep.
SHAPES = [(16, 12), (8, 4), (12, 6), (8, 12), (8, 4), (None, 4), (16, 12)]


def _tables(number: int = len(SHAPES), ranged: bool = False) -> list[MultiLayerEmbeddingBagConfig]:
    tables = []
    for index in range(number):
        k, d = SHAPES[index % len(SHAPES)]
        tables.append(
            MultiLayerEmbeddingBagConfig(
                name=f"t{index}",
                num_embeddings=40 + index,
                embedding_dim=d,
                hidden_dim=k,
                feature_names=[f"f{index}"],
                pooling=PoolingType.MEAN if index == 3 else PoolingType.SUM,
                row_ranges=[(10, 8, 0.5), (10 + index, 4, 0.3), (20, 0, 0.2)] if ranged and index == 1 else None,
            )
        )
    return tables


def _module(weighted: bool, ranged: bool) -> MultiLayerEmbeddingBagCollection:
    return make_positive(MultiLayerEmbeddingBagCollection(_tables(ranged=ranged), is_weighted=weighted, seed=3))


def _bags(step: int, weighted: bool, longest: int) -> Bags:
    """Draw bags of up to ``longest`` ids, or of exactly one for 1; those of t4 are all empty."""
    draw = random.Random(step)

    def bag(table: MultiLayerEmbeddingBagConfig) -> list[tuple[int, float]]:
        size = 1 if longest == 1 else 0 if table.name == "t4" else draw.randint(0, longest)
        return [(draw.randrange(table.num_embeddings), draw.uniform(0.5, 2) if weighted else 1.0) for _ in range(size)]

    return {table.feature_names[0]: [bag(table) for _ in range(ROWS)] for table in _tables()}


def _train(weighted: bool, longest: int, ranged: bool, comm: str) -> dict[str, Any]:
    rank, share = dist.get_rank(), ROWS // dist.get_world_size()
    codecs = exchange_codecs(comm, comm)
    model = shard(_module(weighted, ranged), "adagrad", RATES["rows"], "unique_rows", codecs=codecs)
    optimizer = optimizer_of(model, "adagrad", RATES)
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        bags = _bags(step, weighted, longest)
        found = model(to_kjt(bags, rank * share, (rank + 1) * share, weighted)).to_dict()
        toy_loss(found).backward()
        optimizer.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    return {"outputs": outputs, "weights": full_weights(model)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("weighted", "longest", "ranged", "comm"),
    [
        (False, 1, False, "fp32"),
        (False, 1, True, "fp32"),
        (True, 3, False, "fp32"),
        (False, 3, True, "fp32"),
        (False, 3, False, "bf16"),
    ],
)
def test_outputs_and_weights_equal_the_dense_reference(
    ranks: Ranks, world_size: int, weighted: bool, longest: int, ranged: bool, comm: str
) -> None:
    by_rank = ranks(world_size).run(_train, weighted, longest, ranged, comm)
    reference = DenseReference(dense_tables(_module(weighted, ranged)), "adagrad", RATES)
    close = {"rtol": 2e-5, "atol": 2e-6} if comm == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    for step in range(STEPS):
        for name, expected in reference.step(_bags(step, weighted, longest)).items():
            found = torch.cat([result["outputs"][step][name] for result in by_rank])
            torch.testing.assert_close(found.double(), expected, **close)
    for table in reference.tables:
        for result in by_rank:
            name = f"projections.{table.name}.weight"
            assert (name in result["weights"]) == (table.projection is not None)
            if table.projection is not None:
                torch.testing.assert_close(result["weights"][name].double(), table.projection.detach(), **close)


def _count(number: int) -> tuple[dict[str, int], list[str]]:
    """Return the collectives, and the places of host synchronisations, of the second step of ``number`` tables."""
    model = shard(MultiLayerEmbeddingBagCollection(_tables(number)), exchange="unique_rows")
    bags = {table.feature_names[0]: [[(row, 1.0)] for row in range(ROWS)] for table in _tables(number)}
    batch = to_kjt(bags, 0, ROWS)
    model(batch).values().sum().backward()
    with count_step_operations() as counts:
        model(batch).values().sum().backward()
    return counts.collectives, [call.place for call in counts.synchronisation_calls]


@pytest.mark.parametrize("world_size", [1, 2])
def test_more_tables_and_more_shapes_have_no_more_collectives(ranks: Ranks, world_size: int) -> None:
    two, many = (ranks(world_size).run(_count, number)[0] for number in (2, 26))
    assert two[0] == many[0] == ({} if world_size == 1 else {"alltoall_base_": 4, "allreduce_": 1})
    for _, waits in (two, many):
        assert [place.split(":")[0] for place in waits] == ["unique_rows.py", "row_index.py"], waits
