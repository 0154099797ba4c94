"""Quantised communication: rounding of vectors and gradients within bounds, and no rounding elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import CommOp

from mlet_dist.embeddings.sharded.collectives import (
    CommPrecision,
    ScaledFp16Codec,
    codecs_of,
    exchange_codecs,
    value_bytes,
)
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS, EXCHANGES, ExchangeChoice
from tests.helpers.pairwise import pairwise
from tests.helpers.precision_model import largest_relative_error, small_bags, small_reference, train_small
from tests.helpers.ranks import RankPool

Ranks = Callable[..., RankPool]
METHODS: list[tuple[ExchangeChoice, str]] = [
    *((exchange, "row_wise") for exchange in EXCHANGES),
    *((exchange, kind) for exchange in ("after", "auto") for kind in ("table_wise", "table_row_wise")),
]
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
FLOAT32 = 1e-6
STEPS = 3
LARGEST_WEIGHT = 0.35


def _train(
    optimizer: str,
    method: tuple[ExchangeChoice, str],
    forward: CommPrecision,
    backward: CommPrecision,
    only_rank: int | None = None,
) -> dict[str, Any]:
    codecs = exchange_codecs(forward, backward, local_batch_size=6)
    return train_small(optimizer, method[0], STEPS, codecs=codecs, only_rank=only_rank, kind=method[1])


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "precision", "method"), pairwise([2, 4], ["fp16", "bf16"], METHODS))
def test_outputs_are_within_rounding_of_the_dense_reference(
    ranks: Ranks, world_size: int, precision: CommPrecision, method: tuple[ExchangeChoice, str]
) -> None:
    by_rank = ranks(world_size, 2).run(_train, "sgd", method, precision, precision)
    reference = small_reference("sgd")
    # A row or a complete sum is rounded once. A reduce-scatter rounds each of R partial sums once, and then R-1 sums of
    # them. Between two nodes of two ranks, a node's sum is rounded once more.
    reduced = {"row_wise": 2 * world_size - 1, "table_row_wise": 3 + 1}
    roundings = 1 if method[0] == "unique_rows" else reduced.get(method[1], 1)
    errors = []
    for name, expected in reference.step(small_bags(0)).items():
        found = torch.cat([each["outputs"][0][name] for each in by_rank])
        errors.append(largest_relative_error(found, expected))
        if world_size == 4 and name == "f_tiny" and method[1] == "row_wise":  # replicated
            assert errors.pop() < FLOAT32
    assert UNIT[precision] / 10 < max(errors) < roundings * UNIT[precision] + FLOAT32


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("world_size", "optimizer", "precision", "method"), pairwise([2, 4], ["sgd", "adagrad"], ["fp16", "bf16"], METHODS)
)
def test_weights_are_near_the_reference_and_equal_on_all_ranks(
    ranks: Ranks, world_size: int, optimizer: str, precision: CommPrecision, method: tuple[ExchangeChoice, str]
) -> None:
    first, *others = ranks(world_size, 2).run(_train, optimizer, method, precision, precision)
    reference = small_reference(optimizer)
    for step in range(STEPS):
        reference.step(small_bags(step))
    for table in reference.tables:
        layers = {f"embedding_bags.{table.name}.weight": table.rows}
        if table.projection is not None:
            layers[f"projections.{table.name}.weight"] = table.projection
        for name, expected in layers.items():
            error = (first["weights"][name].double() - expected.detach()).abs().max()
            assert float(error) < world_size * UNIT[precision] * LARGEST_WEIGHT
            for other in others:
                assert torch.equal(other["weights"][name], first["weights"][name]), name


@pytest.mark.multirank
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_backward_are_rounded_independently(ranks: Ranks, method: tuple[ExchangeChoice, str]) -> None:
    plain, forward, backward = (
        ranks(2).run(_train, "sgd", method, *precision)[0]
        for precision in (("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"))
    )
    name = "f_wide"
    assert not torch.equal(forward["outputs"][0][name], plain["outputs"][0][name])
    assert torch.equal(backward["outputs"][0][name], plain["outputs"][0][name])
    assert not torch.equal(backward["outputs"][1][name], plain["outputs"][1][name])


@pytest.mark.multirank
@pytest.mark.parametrize("method", METHODS)
def test_on_one_rank_nothing_is_rounded(ranks: Ranks, method: tuple[ExchangeChoice, str]) -> None:
    plain, rounded = (ranks(1).run(_train, "sgd", method, each, each)[0] for each in ("fp32", "bf16"))
    for name, tensor in plain["weights"].items():
        assert torch.equal(rounded["weights"][name], tensor), name


@pytest.mark.multirank
@pytest.mark.parametrize("method", METHODS)
def test_ranks_without_a_batch_take_part(ranks: Ranks, method: tuple[ExchangeChoice, str]) -> None:
    by_rank = ranks(2).run(_train, "sgd", method, "fp16", "bf16", 1)
    for name, expected in small_reference("sgd").step(small_bags(0)).items():
        assert by_rank[0]["outputs"][0][name].shape[0] == 0
        assert largest_relative_error(by_rank[1]["outputs"][0][name], expected) < 4 * UNIT["fp16"]


def _train_with_torchrecs_own(method: tuple[ExchangeChoice, str]) -> dict[str, Any]:
    config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16, backward_loss_scale=16.0)
    codecs = get_qcomm_codecs_registry(config, device=torch.device("cpu"))
    return train_small("sgd", method[0], STEPS, codecs=codecs, kind=method[1])


@pytest.mark.multirank
@pytest.mark.parametrize("method", METHODS)
def test_torchrecs_own_registry_is_accepted(ranks: Ranks, method: tuple[ExchangeChoice, str]) -> None:
    found = ranks(2).run(_train_with_torchrecs_own, method)[0]["weights"]
    scaled = ranks(2).run(_train, "sgd", method, "fp16", "fp16")[0]["weights"]
    for name, tensor in scaled.items():
        torch.testing.assert_close(found[name], tensor, rtol=4 * UNIT["fp16"], atol=0)


def test_tiny_gradients_are_not_rounded_to_zero() -> None:
    codec = ScaledFp16Codec(4096)
    gradients = torch.tensor([1.5e-8, 1e-7, -3e-6, 0.0, 2.5])
    encoded = codec.encode(gradients)
    assert encoded.dtype == torch.float16
    torch.testing.assert_close(codec.decode(encoded), gradients, rtol=UNIT["fp16"], atol=0)
    assert float(codec.decode(codec.encode(torch.tensor([1e6])))) == 65504 / 4096
    assert codec.decode(codec.encode(torch.tensor([torch.nan]))).isnan()


@pytest.mark.parametrize(("batch", "scale"), [(1, 1), (64, 64), (100, 64), (4096, 4096), (10**6, 4096)])
def test_fp16_gradients_are_scaled_by_the_batch(batch: int, scale: int) -> None:
    registry = exchange_codecs("bf16", "fp16", batch)
    assert registry is not None
    assert set(registry) == {operation.name for operation in CommOp}
    for codecs in registry.values():
        assert codecs.forward.encode(torch.ones(1)).dtype == torch.bfloat16
        assert torch.equal(codecs.backward.encode(torch.ones(1)), torch.tensor([scale], dtype=torch.float16))


def test_sizes_of_values() -> None:
    assert exchange_codecs("fp32", "fp32") is None
    sequence = COMM_OPS["unique_rows"]
    assert value_bytes(codecs_of(None, sequence)) == 8
    assert value_bytes(codecs_of({}, sequence)) == 8
    assert value_bytes(codecs_of(exchange_codecs("fp16", "fp32"), sequence)) == 6
    assert value_bytes(codecs_of(exchange_codecs("fp16", "bf16"), sequence)) == 4
