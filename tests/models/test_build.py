import dataclasses

import pytest
import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.table_settings import TableModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.models.build import build_serving_model, build_training_model, table_bytes
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.helpers.rows_by_id import model_by_id

CPU, META = torch.device("cpu"), torch.device("meta")
MODEL = ModelConfig(
    embedding_dim=4, hidden_dim=6, bottom_mlp=(8, 5), top_mlp=(7,), rows_init="normal", rows_init_std=0.8
)
SPEC = ModelSpec(MODEL, ("I1", "I2", "I3"), (SparseFeature("C1", 10), SparseFeature("C2", 7)), seed=3)
SINGLE = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, hidden_dim=None))
ROWS = 50


def inputs() -> tuple[torch.Tensor, KeyedJaggedTensor]:
    draw = torch.Generator().manual_seed(9)
    ids = [torch.randint(feature.num_embeddings, (ROWS,), generator=draw) for feature in SPEC.sparse]
    lengths = torch.ones(2 * ROWS, dtype=torch.int64)
    return torch.randn(ROWS, 3, generator=draw), KeyedJaggedTensor(["C1", "C2"], torch.cat(ids), lengths=lengths)


def tables_of(model: DLRM) -> EmbeddingBagCollection:
    return model.sparse_arch.embedding_bag_collection


def dense_layers(model: DLRM) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith(TABLES_PREFIX)}


def logits_in_float64(spec: ModelSpec, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a DLRM in plain torch: an MLP of the dense inputs, products of all pairs of vectors, an MLP of both."""
    state = {name: value.double() for name, value in model_by_id(state, spec).items()}
    dense, sparse = inputs()

    def linear(name: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.{layer}._linear.weight"].T + state[f"{name}.{layer}._linear.bias"]

    bottom = dense.double()
    for layer in range(len(spec.model.bottom_mlp) + 1):
        bottom = linear("dense_arch.model._mlp", layer, bottom).relu()
    vectors = [bottom]
    for feature in spec.sparse:
        product = state[f"{TABLES_PREFIX}embedding_bags.{feature.name}.weight"]
        if spec.model.hidden_dim is not None:
            product = product @ state[f"{TABLES_PREFIX}projections.{feature.name}.weight"]
        vectors.append(product[sparse[feature.name].values()])
    pairs = [(vectors[i] * vectors[j]).sum(dim=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    top = torch.cat([bottom, torch.stack(pairs, dim=1)], dim=1)
    for layer in range(len(spec.model.top_mlp)):
        weight, bias = (state[f"over_arch.model.0._mlp.{layer}._linear.{kind}"] for kind in ("weight", "bias"))
        top = (top @ weight.T + bias).relu()
    return top @ state["over_arch.model.1.weight"].T + state["over_arch.model.1.bias"]


@pytest.mark.parametrize("spec", [SPEC, SINGLE], ids=["mlet", "single"])
def test_logits_equal_a_plain_torch_dlrm_in_float64(spec: ModelSpec) -> None:
    model = build_training_model(spec, CPU)
    logits = model(*inputs())
    assert logits.shape == (ROWS, 1)
    assert float(logits.detach().std()) > 0.01
    torch.testing.assert_close(logits.double(), logits_in_float64(spec, model.state_dict()), rtol=1e-5, atol=1e-5)


def test_the_plain_model_with_collapsed_tables_gives_the_same_logits() -> None:
    factorised, plain = build_training_model(SPEC, CPU), build_serving_model(SPEC)
    assert type(tables_of(plain)) is EmbeddingBagCollection
    expected = factorised(*inputs()).detach()
    assert float((plain(*inputs()).detach() - expected).abs().max()) > 1e-2
    tables_of(plain).load_state_dict(tables_of(factorised).collapse().state_dict())
    assert float((plain(*inputs()).detach() - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("tables_device", [CPU, META], ids=str)
def test_dense_layers_depend_on_the_seed_only(tables_device: torch.device) -> None:
    torch.manual_seed(12345)
    first = dense_layers(build_training_model(SPEC, tables_device))
    torch.manual_seed(54321)
    others = [build_training_model(SPEC, CPU), build_serving_model(SPEC), build_training_model(SINGLE, META)]
    for other in map(dense_layers, others):
        assert list(other) == list(first)
        assert all(torch.equal(other[name], value) for name, value in first.items())
    reseeded = dense_layers(build_training_model(dataclasses.replace(SPEC, seed=4), CPU))
    assert not any(torch.equal(reseeded[name], value) for name, value in first.items())


def test_building_on_meta_does_not_change_the_global_generator() -> None:
    before = torch.get_rng_state()
    build_training_model(SPEC, META)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_hidden_layers_in_the_bottom_mlp_works() -> None:
    spec = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, bottom_mlp=(), top_mlp=(1,)))
    model = build_training_model(spec, CPU)
    torch.testing.assert_close(model(*inputs()).double(), logits_in_float64(spec, model.state_dict()))


def test_state_names_of_the_served_model_are_those_of_the_single_layer() -> None:
    assert list(build_serving_model(SPEC).state_dict()) == list(build_training_model(SINGLE, META).state_dict())
    shapes = {name: tuple(value.shape) for name, value in build_training_model(SPEC, META).state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith(TABLES_PREFIX)} == {
        f"{TABLES_PREFIX}embedding_bags.C1.weight": (10, 6),
        f"{TABLES_PREFIX}embedding_bags.C2.weight": (7, 6),
        f"{TABLES_PREFIX}projections.C1.weight": (6, 4),
        f"{TABLES_PREFIX}projections.C2.weight": (6, 4),
    }


def test_table_bytes_by_hand() -> None:
    assert table_bytes(SPEC) == (4 * (17 * 6 + 2 * 6 * 4), 4 * 17 * 4)
    assert table_bytes(SINGLE) == (4 * 17 * 4, 4 * 17 * 4)
    assert table_bytes(SPEC, "fp16") == (2 * 17 * 6 + 4 * 2 * 6 * 4, 4 * 17 * 4)
    huge = dataclasses.replace(SPEC, sparse=(SparseFeature("C1", 10**12),))
    assert table_bytes(huge) == (4 * (6 * 10**12 + 6 * 4), 4 * 4 * 10**12)


def rows_and_projection(**changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    model = dataclasses.replace(MODEL, **changes)
    table = {"C1": model.of_table("C1", 10_000)}
    spec = ModelSpec(model, ("I1",), (SparseFeature("C1", 10_000),), seed=0, table_settings=table)
    tables = tables_of(build_training_model(spec, CPU))
    assert isinstance(tables, MultiLayerEmbeddingBagCollection)
    return tables.embedding_bags["C1"].weight.detach(), tables.projections["C1"].weight.detach()


def test_initial_values_follow_the_config() -> None:
    rows, _ = rows_and_projection(rows_init="uniform")
    assert 0.00999 < float(rows.abs().max()) <= 0.01  # 1/sqrt(10000)
    rows, _ = rows_and_projection(rows_init="uniform", rows_init_gain=3.0)
    assert 0.02997 < float(rows.abs().max()) <= 0.03
    rows, _ = rows_and_projection(rows_init="normal", rows_init_std=0.25, rows_init_gain=2.0)
    assert float(rows.std()) == pytest.approx(0.5, rel=0.02)
    _, projection = rows_and_projection(hidden_dim=2500, projection_init_std=None)
    assert float(projection.std()) == pytest.approx(1 / 50, rel=0.03)
    _, projection = rows_and_projection(hidden_dim=2500, projection_init_std=0.25)
    assert float(projection.std()) == pytest.approx(0.25, rel=0.03)


def test_w2_is_orthogonal_where_the_config_says_so() -> None:
    _, projection = rows_and_projection(hidden_dim=64, projection_init="orthogonal", projection_init_std=0.25)
    torch.testing.assert_close(projection.T @ projection, 4 * torch.eye(4))
    own = {"C1": TableModelConfig(projection_init="orthogonal")}
    _, projection = rows_and_projection(hidden_dim=64, projection_init_std=None, tables=own)
    torch.testing.assert_close(projection.T @ projection, torch.eye(4))


LISTS = (SparseFeature("C1", 10), SparseFeature("tags", 7, multi_valued=True))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_lists_are_pooled_as_configured(pooling: str) -> None:
    model = build_training_model(
        dataclasses.replace(SPEC, sparse=LISTS, model=dataclasses.replace(MODEL, pooling=pooling)), CPU
    )
    tables = tables_of(model)
    batch = KeyedJaggedTensor(["C1", "tags"], torch.tensor([3, 4, 5, 6, 1]), lengths=torch.tensor([1, 1, 3, 0]))
    vectors = tables(batch).to_dict()
    collapsed = tables.collapse()
    rows = collapsed.embedding_bags["tags"].weight[[5, 6, 1]]
    expected = rows.sum(dim=0) if pooling == "sum" else rows.mean(dim=0)
    torch.testing.assert_close(vectors["tags"], torch.stack([expected, torch.zeros(4)]))
    torch.testing.assert_close(vectors["C1"], collapsed.embedding_bags["C1"].weight[[3, 4]])


def test_a_weighted_feature_makes_both_models_weighted() -> None:
    sparse = (LISTS[0], dataclasses.replace(LISTS[1], weighted=True))
    spec = dataclasses.replace(SPEC, sparse=sparse)
    batch = KeyedJaggedTensor(
        ["C1", "tags"],
        torch.tensor([3, 4, 5, 6, 1]),
        weights=torch.tensor([1.0, 1.0, 0.5, -2.0, 3.0]),
        lengths=torch.tensor([1, 1, 3, 0]),
    )
    model, plain = build_training_model(spec, CPU), build_serving_model(spec)
    tables_of(plain).load_state_dict(tables_of(model).collapse().state_dict())
    expected = torch.tensor([0.5, -2.0, 3.0]) @ tables_of(plain).embedding_bags["tags"].weight[[5, 6, 1]]
    for tables in (tables_of(model), tables_of(plain)):
        torch.testing.assert_close(tables(batch)["tags"][0], expected)


@pytest.mark.parametrize("spec", [SPEC, SINGLE])
def test_a_table_whose_id_0_is_never_trained_begins_with_a_zero_row(spec: ModelSpec) -> None:
    expected = build_training_model(spec, CPU).state_dict()
    found = build_training_model(dataclasses.replace(spec, zero_first_rows=("C2",)), CPU).state_dict()
    row = found[f"{TABLES_PREFIX}embedding_bags.C2.weight"]
    assert row[0].eq(0).all()
    row[0] = expected[f"{TABLES_PREFIX}embedding_bags.C2.weight"][0]
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
