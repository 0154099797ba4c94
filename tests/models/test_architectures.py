"""The networks of ``model.name``, against plain products of their weights in float64."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from mlet_dist.config.model_section import ModelConfig, ModelName
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_serving_model, build_training_model, with_tables_prefix
from mlet_dist.models.spec import ONE_LABEL, TABLES_PREFIX, ModelSpec
from tests.helpers.rows_by_id import model_by_id

CPU = torch.device("cpu")
D, ROWS = 4, 50
MODEL = ModelConfig(
    embedding_dim=D,
    hidden_dim=6,
    bottom_mlp=(8, 5),
    top_mlp=(7, 6),
    rows_init="normal",
    rows_init_std=0.8,
    cross_layers=2,
    cross_rank=3,
    fm_dim=5,
    query_features=("C3", "C1"),
)
SPEC = ModelSpec(MODEL, ("I1", "I2", "I3"), tuple(SparseFeature(f"C{i}", 7 + i) for i in (1, 2, 3)), seed=3)
State = dict[str, torch.Tensor]


def spec_of(name: ModelName) -> ModelSpec:
    return dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, name=name))


def inputs() -> tuple[torch.Tensor, KeyedJaggedTensor]:
    draw = torch.Generator().manual_seed(9)
    ids = [torch.randint(feature.num_embeddings, (ROWS,), generator=draw) for feature in SPEC.sparse]
    names = [feature.name for feature in SPEC.sparse]
    lengths = torch.ones(len(names) * ROWS, dtype=torch.int64)
    return torch.randn(ROWS, 3, generator=draw), KeyedJaggedTensor(names, torch.cat(ids), lengths=lengths)


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(state: State, name: str, layers: int, x: torch.Tensor) -> torch.Tensor:
    for layer in range(layers):
        x = linear(state, f"{name}._mlp.{layer}._linear", x).relu()
    return x


def over(state: State, x: torch.Tensor) -> torch.Tensor:
    return linear(state, "over_arch.model.1", mlp(state, "over_arch.model.0", 2, x))


def dlrm(state: State, dense: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    bottom = mlp(state, "dense_arch.model", 3, dense)
    each = [bottom, *vectors.values()]
    pairs = [(each[i] * each[j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
    return over(state, torch.cat([bottom, torch.stack(pairs, 1)], 1))


def dlrm_dcn(state: State, dense: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    first = torch.cat([mlp(state, "dense_arch.model", 3, dense), *vectors.values()], 1)
    x, cross = first, "inter_arch.crossnet"
    for layer in range(2):
        w, v, bias = (state[f"{cross}.{kind}.{layer}"] for kind in ("W_kernels", "V_kernels", "bias"))
        x = first * (x @ v.T @ w.T + bias) + x
    return over(state, x)


def deepfm(state: State, dense: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    bottom = mlp(state, "dense_arch.model", 3, dense)
    flat = torch.cat([bottom, *vectors.values()], 1)
    columns = flat.shape[1]
    fm = sum((flat[:, i] * flat[:, j] for i in range(columns) for j in range(i)), torch.zeros(ROWS)).unsqueeze(1)
    return over(state, torch.cat([bottom, mlp(state, "deep_fm.dense_module", 1, flat), fm], 1))


def two_tower(state: State, dense: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    def tower(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(state, f"{name}.1", mlp(state, f"{name}.0", 1, x))

    query = tower("query_tower", torch.cat([dense, vectors["C1"], vectors["C3"]], 1))
    return (query * tower("candidate_tower", vectors["C2"])).sum(1, keepdim=True)


REFERENCES: dict[ModelName, Callable[..., torch.Tensor]] = {
    "dlrm": dlrm,
    "dlrm_dcn": dlrm_dcn,
    "deepfm": deepfm,
    "two_tower": two_tower,
}


OWN_SIZES = {"C1": (12, None), "C2": (8, 16), "C3": (D, None)}
"""d and k of tables of their own sizes, for the networks that concatenate vectors."""


def with_own_sizes(spec: ModelSpec) -> ModelSpec:
    of_all = spec.model.of_all_tables
    own = {
        name: dataclasses.replace(of_all, embedding_dim=d, hidden_dim=k, projection_init_std=0.4)
        for name, (d, k) in OWN_SIZES.items()
    }
    return dataclasses.replace(spec, table_settings=own)


@pytest.mark.parametrize(
    ("name", "own_sizes", "labels"),
    [
        *((name, False, ONE_LABEL) for name in get_args(ModelName)),
        ("dlrm_dcn", True, ONE_LABEL),
        ("two_tower", True, ONE_LABEL),
        *((name, False, ("click", "buy")) for name in get_args(ModelName) if name != "two_tower"),
        ("dlrm_dcn", True, ("click", "buy")),
    ],
)
def test_logits_equal_plain_products_in_float64(name: ModelName, own_sizes: bool, labels: tuple[str, ...]) -> None:
    spec = dataclasses.replace(with_own_sizes(spec_of(name)) if own_sizes else spec_of(name), labels=labels)
    model = build_training_model(spec, CPU)
    logits = model(*inputs())
    state = {key: value.double() for key, value in model_by_id(model.state_dict(), spec).items()}
    dense, sparse = inputs()
    vectors = {}
    for table in spec.tables:
        rows = state[f"{TABLES_PREFIX}embedding_bags.{table.name}.weight"]
        w2 = state.get(f"{TABLES_PREFIX}projections.{table.name}.weight")
        assert rows.shape[1] == (table.hidden_dim or table.embedding_dim)
        vectors[table.name] = (rows if w2 is None else rows @ w2)[sparse[table.name].values()]
    expected = REFERENCES[name](state, dense.double(), vectors)
    assert float(expected.std()) > 1e-3
    assert expected.shape == (ROWS, len(labels))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", get_args(ModelName))
def test_the_serving_model_has_the_same_dense_layers_and_names(name: ModelName) -> None:
    spec = spec_of(name)
    assert with_tables_prefix(spec) == spec
    trained, served = build_training_model(spec, CPU).state_dict(), build_serving_model(spec).state_dict()
    dense = {key for key in trained if not key.startswith(TABLES_PREFIX)}
    assert dense == {key for key in served if not key.startswith(TABLES_PREFIX)}
    assert all(torch.equal(trained[key], served[key]) for key in dense)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (("C1", "C9"), "model.query_features: the model has no feature 'C9'; it has C1, C2, C3"),
        (("C1", "C2", "C3"), "model.query_features names all features; leave some for the candidate tower"),
    ],
)
def test_towers_without_features_are_refused(features: tuple[str, ...], message: str) -> None:
    model = dataclasses.replace(MODEL, name="two_tower", query_features=features)
    with pytest.raises(UserError) as caught:
        with_tables_prefix(dataclasses.replace(SPEC, model=model))
    assert str(caught.value) == message


def test_a_tower_of_one_layer_is_linear() -> None:
    model = dataclasses.replace(MODEL, name="two_tower", top_mlp=(3,))
    towers = build_training_model(dataclasses.replace(SPEC, model=model), CPU)
    assert [type(layer) for layer in towers.get_submodule("query_tower")] == [nn.Linear]
