"""A network on stand-in tables: its work and memory, as the planner measures them, and whether it can be traced."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings.planning.plan_cost import DenseCost
from mlet_dist.models.network_check import tracing_problem
from mlet_dist.models.network_cost import dense_cost

D, DENSE = 4, 3


class Mlp(nn.Module):
    """Three linear layers of the vectors of two features."""

    def __init__(self, tables: EmbeddingBagCollection, hidden: int) -> None:
        super().__init__()
        self.tables = tables
        self.layers = nn.Sequential(nn.Linear(2 * D, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        return self.layers(self.tables(features).values())


def tables() -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=1000, embedding_dim=D, feature_names=[name])
        for name in ("C1", "C2")
    ]
    return EmbeddingBagCollection(configs, device=torch.device("meta"))


def cost_of(model: nn.Module) -> DenseCost:
    return dense_cost(model, DENSE, 32, "adagrad", 2, 2)


@pytest.mark.parametrize("hidden", [64, 1000])
def test_an_mlp_by_hand(hidden: int) -> None:
    cost = cost_of(Mlp(tables(), hidden))
    assert cost.note is None
    assert cost.parameters == 2 * D * hidden + hidden + hidden + 1
    assert cost.row_flops == 2 * (2 * D * hidden + hidden)
    # ReLU's output, the gradient of it and of its input; beside them the vectors and the loss.
    assert 3 * hidden <= cost.row_activations <= 3 * hidden + 4 * D + 10
    assert cost.row_traffic > 2 * cost.row_activations
    assert cost.activation_bytes() == 4 * 32 * cost.row_activations
    assert cost.step().flops == 3 * 32 * cost.row_flops


def test_the_layers_of_dlrm_are_those_of_its_matrix_products() -> None:
    model = DLRM(tables(), DENSE, [16, D], [8, 1])
    vectors, pairs = 3, 3
    layers = DENSE * 16 + 16 * D + (D + pairs) * 8 + 8
    cost = cost_of(model)
    assert cost.row_flops == 2 * (layers + vectors * vectors * D)
    assert cost.parameters == layers + 16 + D + 8 + 1


def test_tables_do_not_count_and_stay_in_place() -> None:
    model = Mlp(tables(), 16)
    own = model.tables
    few = cost_of(model)
    assert model.tables is own
    for bag in own.embedding_bags.values():
        bag.weight = nn.Parameter(torch.empty(10**9, D, device="meta"))
    assert cost_of(model) == few


def test_without_the_number_of_dense_columns_layers_are_estimated() -> None:
    cost = dense_cost(Mlp(tables(), 16), None, 32, "sgd", 1, 1)
    assert (cost.row_flops, cost.note) == (2 * cost.parameters, None)


class DependsOnValues(nn.Module):
    def forward(self, logits):  # type: ignore[no-untyped-def]
        return logits if float(logits.sum()) > 0 else -logits


class Chooses(Mlp):
    """Branches on values where it calls the tables."""

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        vectors = self.tables(features).values()
        return self.layers(vectors) if float(dense[0, 0]) > 0 else -self.layers(vectors)


class OfThree(Mlp):
    """Takes one argument more than a batch has, which may be left out."""

    def forward(self, dense, features, scale=1.0):  # type: ignore[no-untyped-def]
        return super().forward(dense, features) * scale


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_without_tables_are_not_traced(compiled: bool) -> None:
    model = Mlp(tables(), 16)
    model.layers.append(DependsOnValues())
    if compiled:
        model.layers.compile(backend="eager")
    assert tracing_problem(model) is None


@pytest.mark.parametrize(("network", "problem"), [(Chooses, "TypeError: "), (OfThree, "RuntimeError: ")])
def test_what_the_pipeline_cannot_trace_is_named(network: type[Mlp], problem: str) -> None:
    found = tracing_problem(network(tables(), 16))
    assert found is not None
    assert found.startswith(problem)
    assert "\n" not in found
