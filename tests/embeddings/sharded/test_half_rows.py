"""W1 in half precision: rows are fp16, and vectors, W2 and optimizer states are float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, Exchange
from tests.helpers.pairwise import pairwise
from tests.helpers.precision_model import (
    GLOBAL_BATCH,
    HALF_TABLES,
    largest_relative_error,
    small_bags,
    small_module,
    small_reference,
    small_tables,
    train_small,
)
from tests.helpers.ranks import RankFailed, RankPool
from tests.helpers.sharded_module import full_weights, shard, to_kjt, unsharded_weights

Ranks = Callable[[int], RankPool]
UNIT = 2.0**-11
FLOAT32 = 1e-6
LARGEST_WEIGHT = 0.35
STEPS = 3


def _train(optimizer: str, exchange: Exchange) -> dict[str, Any]:
    return train_small(optimizer, exchange, STEPS, DataType.FP16)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("world_size", "optimizer", "exchange"), pairwise([1, 2, 4], ["sgd", "adagrad", "rowwise_adagrad"], EXCHANGES)
)
def test_rows_are_within_rounding_of_the_dense_reference(
    ranks: Ranks, world_size: int, optimizer: str, exchange: Exchange
) -> None:
    by_rank = ranks(world_size).run(_train, optimizer, exchange)
    reference = small_reference(optimizer, DataType.FP16)
    for step in range(STEPS):
        for name, expected in reference.step(small_bags(step)).items():
            found = torch.cat([each["outputs"][step][name] for each in by_rank])
            # Before the first update the rows equal those of the reference, and they are summed in float32.
            error, largest = (found.double() - expected).abs().max(), expected.abs().max()
            assert float(error) < (2 * step * UNIT or FLOAT32) * float(largest)
    first, *others = by_rank
    for table in reference.tables:
        found = first["weights"][f"embedding_bags.{table.name}.weight"].double()
        assert float((found - table.rows.detach()).abs().max()) < STEPS * UNIT * LARGEST_WEIGHT
        for name in (f"embedding_bags.{table.name}.weight", f"projections.{table.name}.weight"):
            for other in others:
                assert name not in first["weights"] or torch.equal(other["weights"][name], first["weights"][name])


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [2, 4])
def test_only_sharded_rows_are_half(ranks: Ranks, world_size: int) -> None:
    first = ranks(world_size).run(_train, "adagrad", "unique_rows")[0]
    half = {name for name, dtype in first["dtypes"].items() if dtype == torch.float16}
    replicated = {"tiny"} if world_size == 4 else set()
    assert half == {f"embedding_bags.{table}.weight" for table in set(HALF_TABLES) - replicated}
    assert {dtype for name, dtype in first["dtypes"].items() if name not in half} == {torch.float32}
    assert first["optimizer_dtypes"] == {torch.float32}


def _initial_weights(filled: bool) -> dict[str, torch.Tensor]:
    tables = small_tables(DataType.FP16)
    module = (
        small_module(DataType.FP16)
        if filled
        else MultiLayerEmbeddingBagCollection(tables, device=torch.device("meta"), seed=3)
    )
    return full_weights(shard(module))


@pytest.mark.multirank
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_initial_values_do_not_depend_on_the_number_of_ranks(ranks: Ranks, world_size: int, filled: bool) -> None:
    unsharded = (
        small_module(DataType.FP16) if filled else MultiLayerEmbeddingBagCollection(small_tables(DataType.FP16), seed=3)
    )
    single = unsharded_weights(MultiLayerEmbeddingBagCollection(small_tables(), seed=3))
    for initial in ranks(world_size).run(_initial_weights, filled):
        for name, tensor in unsharded_weights(unsharded).items():
            assert torch.equal(initial[name], tensor.float()), name
            if not filled:
                assert torch.equal(tensor, single[name].to(tensor.dtype))


def test_the_unsharded_collection_looks_up_and_collapses() -> None:
    module = small_module(DataType.FP16)
    bags = small_bags(0)
    expected = small_reference("sgd", DataType.FP16).forward(bags)
    found = module(to_kjt(bags, 0, GLOBAL_BATCH))
    assert found.values().dtype == torch.float32
    for name, values in found.to_dict().items():
        assert largest_relative_error(values, expected[name]) < 2 * UNIT  # torch also rounds the pooled vector
    for name, weight in module.collapse().state_dict().items():
        table = name.split(".")[1]
        rows = unsharded_weights(module)[f"embedding_bags.{table}.weight"].double()
        product = rows @ module.projections[table].weight.double() if table in module.projections else rows
        assert weight.dtype == (torch.float16 if table in HALF_TABLES else torch.float32)
        assert largest_relative_error(weight, product) < UNIT + FLOAT32


def test_per_sample_weights_need_a_sharded_collection_or_float32() -> None:
    module = MultiLayerEmbeddingBagCollection(small_tables(DataType.FP16), is_weighted=True)
    with pytest.raises(ValueError, match=r"table 'wide': .*FP16.*FP32"):
        module(to_kjt(small_bags(0), 0, 4, weighted=True))


@pytest.mark.multirank
def test_adam_on_a_cpu_is_refused(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match=r"ValueError: table 'wide': rows in FP16 need a fused kernel.*Adam"):
        ranks(2).run(_train, "adam", "unique_rows")


@pytest.mark.parametrize("data_type", [DataType.INT8, DataType.BF16])
def test_other_dtypes_of_rows_are_refused(data_type: DataType) -> None:
    settings: dict[str, Any] = {"name": "t", "num_embeddings": 9, "embedding_dim": 4, "data_type": data_type}
    with pytest.raises(ValueError, match=rf"table 't': data_type is {data_type.name}; rows are FP32 or FP16"):
        MultiLayerEmbeddingBagConfig(**settings)
    with pytest.raises(ValueError, match=r"table 't': data_type"):
        MultiLayerEmbeddingBagCollection([EmbeddingBagConfig(**settings)])


@pytest.mark.parametrize("output", [SparseType.FP16, DataType.BF16])
def test_lookups_in_half_precision_are_refused(output: SparseType | DataType) -> None:
    with pytest.raises(ValueError, match=rf"output_dtype is {output.name}.*qcomm_codecs_registry"):
        MultiLayerEmbeddingBagCollectionSharder(fused_params={"output_dtype": output})
    MultiLayerEmbeddingBagCollectionSharder(fused_params={"output_dtype": SparseType.FP32})
