"""A few tables of all kinds, trained on the same bags in sharded and in dense form, for tests of precision."""

import random
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.modules.embedding_configs import DataType, PoolingType

from mlet_dist.config.sections import Precision
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from mlet_dist.training.dense_arithmetic import forward_precision
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.sharded_module import dense_tables, full_weights, make_positive, optimizer_of, shard, to_kjt

RATES = {"rows": 0.05, "projections": 0.02}
GLOBAL_BATCH = 12
HALF_TABLES = ("wide", "single_layer", "averaged", "tiny")


def small_tables(rows: DataType = DataType.FP32) -> list[MultiLayerEmbeddingBagConfig]:
    """Return tables with rows of dtype ``rows``, of which ``tiny`` is replicated on 4 ranks, and ``full`` in FP32."""

    def table(name: str, n: int, k: int | None, **settings: Any) -> MultiLayerEmbeddingBagConfig:
        return MultiLayerEmbeddingBagConfig(
            name=name, num_embeddings=n, embedding_dim=4, hidden_dim=k, feature_names=[f"f_{name}"], **settings
        )

    return [
        table("wide", 101, 16, data_type=rows),
        table("single_layer", 50, None, data_type=rows),
        table("averaged", 40, 16, data_type=rows, pooling=PoolingType.MEAN),
        table("tiny", 5, 16, data_type=rows),
        table("full", 60, 16),
    ]


def small_bags(seed: int, longest: int = 5) -> Bags:
    """Draw bags of 0 to ``longest`` ids with repeats."""
    draw = random.Random(seed)
    return {
        table.feature_names[0]: [
            [(draw.randrange(table.num_embeddings), 1.0) for _ in range(draw.randint(0, longest))]
            for _ in range(GLOBAL_BATCH)
        ]
        for table in small_tables()
    }


def small_module(rows: DataType = DataType.FP32) -> MultiLayerEmbeddingBagCollection:
    """Return a module with positive values; those of FP16 rows are rounded to FP16."""
    return make_positive(MultiLayerEmbeddingBagCollection(small_tables(rows), seed=11))


def train_small(
    optimizer: str,
    exchange: ExchangeChoice,
    steps: int,
    rows: DataType = DataType.FP32,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
    only_rank: int | None = None,
    kind: str = "row_wise",
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Train on all ranks; return this rank's ``outputs`` by step, full ``weights``, and dtypes of weights and states.

    Args:
        only_rank: the rank that gets the batch; the others' batches are empty.
        kind: sharding type of all tables.
        precision: of the products with W2.
    """
    types = {table.name: kind for table in small_tables()}
    model = shard(small_module(rows), optimizer, exchange=exchange, codecs=codecs, sharding_types=types)
    stepper = optimizer_of(model, optimizer, RATES)
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    begin, end = rank * share, (rank + 1) * share
    if only_rank is not None:
        begin, end = (0, GLOBAL_BATCH) if rank == only_rank else (0, 0)
    outputs = []
    for step in range(steps):
        stepper.zero_grad()
        with forward_precision(precision, torch.device("cpu")):
            found = model(to_kjt(small_bags(step), begin, end)).to_dict()
        (toy_loss(found) if begin < end else sum(each.sum() for each in found.values())).backward()
        stepper.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    state = {name.removeprefix("0."): tensor for name, tensor in model.state_dict().items()}
    return {
        "outputs": outputs,
        "weights": full_weights(model),
        "dtypes": {name: tensor.dtype for name, tensor in state.items()},
        "optimizer_dtypes": {
            tensor.dtype for states in stepper.state_dict()["state"].values() for tensor in states.values()
        },
    }


def small_reference(optimizer: str, rows: DataType = DataType.FP32) -> DenseReference:
    """Return the dense float64 model with the same initial values."""
    return DenseReference(
        dense_tables(small_module(rows)),
        optimizer,
        RATES,
    )


def largest_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error; where zero is expected, only zero counts as no error."""
    error = (found.double() - expected).abs() / expected.abs()
    return float(torch.where((found == 0) & (expected == 0), torch.zeros_like(error), error).max())
