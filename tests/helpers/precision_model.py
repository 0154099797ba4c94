"""A few tables of all kinds, trained on the same bags in sharded and in dense form, for tests of precision."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.modules.embedding_configs import DataType, PoolingType

from mlet_dist.config.sections import Precision, TrainConfig
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from mlet_dist.training.dense_arithmetic import dense_arithmetic, forward_precision
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.ranks import rank_device
from tests.helpers.sharded_module import dense_tables, full_weights, make_positive, optimizer_of, shard, to_kjt

RATES = {"rows": 0.05, "projections": 0.02}
GLOBAL_BATCH = 12
FLOAT32 = 2.0**-20
UNITS = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}
"""The largest relative error of one rounding to each format; that of tf32 holds where bits are cut off, too."""
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
    kernels: Sequence[str] = (),
) -> dict[str, Any]:
    """Train on all ranks; return this rank's ``outputs`` by step, full ``weights``, and dtypes of weights and states.

    Args:
        only_rank: the rank that gets the batch; the others' batches are empty.
        kind: sharding type of all tables.
        precision: of the products with W2.
        kernels: compute kernels that the planner may use.
    """
    types = {table.name: kind for table in small_tables()}
    model = shard(
        small_module(rows), optimizer, exchange=exchange, codecs=codecs, sharding_types=types, kernels=kernels
    )
    stepper = optimizer_of(model, optimizer, RATES)
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    begin, end = rank * share, (rank + 1) * share
    if only_rank is not None:
        begin, end = (0, GLOBAL_BATCH) if rank == only_rank else (0, 0)
    outputs = []
    for step in range(steps):
        stepper.zero_grad()
        with forward_precision(precision, rank_device()):
            found = model(to_kjt(small_bags(step), begin, end)).to_dict()
        (toy_loss(found) if begin < end else sum(each.sum() for each in found.values())).backward()
        stepper.step()
        outputs.append({name: output.detach().cpu() for name, output in found.items()})
    state = {name.removeprefix("0."): tensor for name, tensor in model.state_dict().items()}
    return {
        "outputs": outputs,
        "weights": full_weights(model),
        "dtypes": {name: tensor.dtype for name, tensor in state.items()},
        "kernels": sorted({each.compute_kernel for each in next(iter(model.plan.plan.values())).values()}),
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


def error_bound(roundings: int, precision: Precision) -> float:
    """Return the largest relative error after as many roundings of positive values that are multiplied and added."""
    return float((1 + UNITS[precision]) ** roundings - 1 + FLOAT32)


def train_in_precision(exchange: ExchangeChoice, precision: Precision) -> dict[str, Any]:
    """Train one step of SGD on all ranks; as ``train_small``, for ``check_rounding``."""
    with dense_arithmetic(TrainConfig(precision=precision), torch.nn.Identity(), rank_device()):
        return train_small("sgd", exchange, 1, precision=precision)


def check_rounding(by_rank: list[dict[str, Any]], precision: Precision) -> float:
    """Check that outputs and weights err by no more than their format explains; return the largest error of outputs."""
    reference = small_reference("sgd")
    before = [(each.rows.clone(), each.projection) for each in reference.tables]
    before = [(rows, None if second is None else second.clone()) for rows, second in before]
    largest = 0.0
    for name, expected in reference.step(small_bags(0)).items():
        error = largest_relative_error(torch.cat([each["outputs"][0][name] for each in by_rank]), expected)
        # A row, W2 and their product are rounded; tables without W2 are not.
        assert error <= (FLOAT32 if name == "f_single_layer" else error_bound(3, precision)), (name, error)
        largest = max(largest, error)
    assert precision != "bf16" or largest > UNITS["bf16"] / 4, "bf16 was not used"
    for table, (rows, second) in zip(reference.tables, before, strict=True):
        for kind, now, then in (("embedding_bags", table.rows, rows), ("projections", table.projection, second)):
            if now is None or then is None:
                continue
            found = by_rank[0]["weights"][f"{kind}.{table.name}.weight"]
            assert found.dtype == torch.float32
            # The gradient of the output errs as the output does, and is rounded in two products.
            allowed = error_bound(6, precision) * (now - then).abs() + FLOAT32 * now.abs()
            assert ((found.double() - now).abs() <= allowed).all(), (kind, table.name)
    dtypes = set(by_rank[0]["dtypes"].values()) | by_rank[0]["optimizer_dtypes"]
    assert dtypes <= {torch.float32, torch.int64}, dtypes
    return largest
