"""Tests that the control of `mlet compare` has MLET's initial scale and its mean first step."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from mlet_dist.comparison import single_layer_control
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec

ROWS, DRAWS, RATE = 400, 60, 0.3
GRADIENT = torch.tensor([1.0, -2.0, 0.5, 3.0])


def tables(model: ModelConfig, seed: int) -> MultiLayerEmbeddingBagCollection:
    spec = ModelSpec(model, ("I1",), (SparseFeature("C1", ROWS),), seed)
    found = build_training_model(spec, torch.device("cpu")).sparse_arch.embedding_bag_collection
    assert isinstance(found, MultiLayerEmbeddingBagCollection)
    return found


def served(module: MultiLayerEmbeddingBagCollection) -> torch.Tensor:
    return module.collapse().embedding_bags["C1"].weight.detach().clone()


def initial_scale(model: ModelConfig) -> float:
    """Return the root mean square of the served table, over draws."""
    return math.sqrt(sum(float(served(tables(model, seed)).square().mean()) for seed in range(DRAWS)) / DRAWS)


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"embedding_dim": 4, "hidden_dim": 32, "bottom_mlp": (), "top_mlp": (1,), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"projection_init_std": 0.25},
        {"projection_init_std": None},
        {"projection_init_std": 0.1, "rows_init": "normal", "rows_init_std": 0.25},
        {"projection_init_std": 0.5, "hidden_dim": 8, "rows_init_gain": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_the_control_starts_at_the_scale_of_the_collapsed_table(changes: dict[str, Any], optimizer: str) -> None:
    model = model_config(**changes)
    control, _ = single_layer_control(model, optimizer)
    assert control.hidden_dim is None
    assert initial_scale(control) == pytest.approx(initial_scale(model), rel=0.04)


def test_scale_and_rate_by_hand() -> None:
    control, factor = single_layer_control(model_config(hidden_dim=64, projection_init_std=0.25), "sgd")
    assert control == model_config(hidden_dim=None, projection_init_std=0.25, rows_init_gain=2.0)
    assert factor == 4.0
    control, factor = single_layer_control(model_config(hidden_dim=64, projection_init_std=None), "sgd")
    assert (control.rows_init_gain, factor) == (pytest.approx(1), pytest.approx(1))


def test_tables_of_their_own_sizes_have_their_own_scale() -> None:
    model = model_config(hidden_dim=64, projection_init_std=0.25)
    of_all = model.of_all_tables
    own = {
        "small": dataclasses.replace(of_all, hidden_dim=None),
        "wide": dataclasses.replace(of_all, embedding_dim=32, hidden_dim=256, projection_init_std=0.5, pooling="mean"),
    }
    control, factor = single_layer_control(model, "sgd", own)
    assert factor == 4.0
    expected = {name: dataclasses.replace(each, hidden_dim=None) for name, each in own.items()}
    expected["wide"] = dataclasses.replace(expected["wide"], rows_init_gain=8.0, projection_init_std=0.25)
    assert {name: control.of_table(name, 10**6) for name in own} == expected
    assert control.of_table("other", 10**6).rows_init_gain == 2.0


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_single_layer_is_its_own_control(optimizer: str) -> None:
    single = model_config(hidden_dim=None, rows_init_gain=2.0)
    assert single_layer_control(single, optimizer) == (single, 1.0)


def step_of_row(module: MultiLayerEmbeddingBagCollection, row: int, rate: float) -> torch.Tensor:
    """Return how one SGD step on a loss of gradient GRADIENT moves a row of the served table, whose rows are all 0."""
    with torch.no_grad():
        module.embedding_bags["C1"].weight.zero_()
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    before = served(module)
    output = module(KeyedJaggedTensor(["C1"], torch.tensor([row]), lengths=torch.tensor([1]))).values()
    (output * GRADIENT).sum().backward()
    optimizer.step()
    moved = served(module) - before
    assert not moved[torch.arange(ROWS) != row].any()
    return moved[row]


@pytest.mark.parametrize(("hidden_dim", "std"), [(32, 0.25), (64, 0.25), (16, None)])
def test_a_step_of_sgd_moves_a_row_k_sigma_squared_times_further(hidden_dim: int, std: float | None) -> None:
    model = model_config(hidden_dim=hidden_dim, projection_init_std=std)
    control, factor = single_layer_control(model, "sgd")
    assert factor == pytest.approx(hidden_dim * (std or hidden_dim**-0.5) ** 2)
    moves = []
    for seed in range(4 * DRAWS):
        module = tables(model, seed)
        projection = module.projections["C1"].weight.detach().double()
        moves.append(step_of_row(module, 7, RATE))
        expected = -RATE * GRADIENT.double() @ projection.T @ projection
        torch.testing.assert_close(moves[-1].double(), expected, rtol=1e-4, atol=1e-5)
    mean = torch.stack(moves).double().mean(dim=0)
    of_control = step_of_row(tables(control, 0), 7, RATE * factor)
    torch.testing.assert_close(of_control, -RATE * factor * GRADIENT, rtol=1e-6, atol=0)
    difference = (mean - of_control.double()).norm() / of_control.double().norm()
    assert float(difference) < 0.06  # its standard error is sqrt(5 / k / draws), at most 0.036


@pytest.mark.parametrize(("hidden_dim", "embedding_dim", "std"), [(64, 16, None), (64, 4, 0.25), (32, 16, 0.25)])
def test_a_first_step_of_adagrad_moves_w_as_far_along_the_gradient(
    hidden_dim: int, embedding_dim: int, std: float | None
) -> None:
    model = model_config(hidden_dim=hidden_dim, embedding_dim=embedding_dim, projection_init_std=std)
    _, factor = single_layer_control(model, "adagrad")
    draw = torch.Generator().manual_seed(1)
    along_mlet, along_single = 0.0, 0.0
    for seed in range(300):
        gradient = torch.randn(embedding_dim, generator=draw)
        projection = tables(model, seed).projections["C1"].weight.detach()
        # Adagrad's first step divides each element by its own size: lr·sign.
        along_mlet += float(torch.sign(gradient @ projection.T) @ projection @ gradient / gradient.norm())
        along_single += float(torch.sign(gradient) @ gradient / gradient.norm())
    assert along_mlet / along_single == pytest.approx(factor, rel=0.06)
