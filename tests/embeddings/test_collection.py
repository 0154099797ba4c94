import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from tests.helpers.sharded_module import unsharded_weights

META = torch.device("meta")
KEYS = ["f1", "f2"]
IDS = {"f1": [[0, 2, 2], [], [4]], "f2": [[1], [0, 3], [2, 2, 1, 0]]}
SAMPLE_WEIGHTS = {"f1": [[0.5, -1.0, 2.0], [], [3.0]], "f2": [[1.5], [2.0, -0.25], [1.0, 0.0, -2.0, 0.5]]}


def table(name: str = "t", n: int = 5, d: int = 3, k: int | None = 7, **more: Any) -> MultiLayerEmbeddingBagConfig:
    return MultiLayerEmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=d, hidden_dim=k, **more)


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """Return tables with f1 in three of them and f2 in two; one is single-layer, one has TorchRec's own config."""
    return [
        table("wide", feature_names=["f1", "f2"], pooling=pooling),
        table("narrow", d=2, k=1, feature_names=["f1"], pooling=pooling),
        table("single", d=4, k=None, feature_names=["f2"], pooling=pooling),
        EmbeddingBagConfig(name="plain", num_embeddings=5, embedding_dim=2, feature_names=["f1"], pooling=pooling),
    ]


OUTPUT_KEYS = ["f1@wide", "f2@wide", "f1@narrow", "f2@single", "f1@plain"]


def features(weighted: bool = False) -> KeyedJaggedTensor:
    def flat(bags: dict[str, list[list[Any]]]) -> list[Any]:
        return [each for key in KEYS for bag in bags[key] for each in bag]

    return KeyedJaggedTensor(
        KEYS,
        torch.tensor(flat(IDS)),
        torch.tensor(flat(SAMPLE_WEIGHTS)) if weighted else None,
        lengths=torch.tensor([len(bag) for key in KEYS for bag in IDS[key]]),
    )


def expected_output(module: MultiLayerEmbeddingBagCollection, key: str, weighted: bool, mean: bool) -> torch.Tensor:
    feature, _, name = key.partition("@")
    state = {name: value.double() for name, value in unsharded_weights(module).items()}
    product = state[f"embedding_bags.{name}.weight"]
    if f"projections.{name}.weight" in state:
        product = product @ state[f"projections.{name}.weight"]
    vectors = []
    for ids, factors in zip(IDS[feature], SAMPLE_WEIGHTS[feature], strict=True):
        total = torch.zeros(product.shape[1], dtype=torch.float64)
        for each, factor in zip(ids, factors, strict=True):
            total += product[each] * (factor if weighted else 1)
        vectors.append(total / len(ids) if mean and ids else total)
    return torch.stack(vectors)


@pytest.mark.parametrize(
    ("pooling", "weighted"), [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)]
)
def test_forward_and_collapse_equal_the_product_in_float64(pooling: PoolingType, weighted: bool) -> None:
    module = MultiLayerEmbeddingBagCollection(tables(pooling), is_weighted=weighted, seed=3)
    collapsed = module.collapse()
    assert collapsed.is_weighted() == weighted
    found, served = module(features(weighted)), collapsed(features(weighted))
    assert found.keys() == served.keys() == OUTPUT_KEYS
    assert found.length_per_key() == served.length_per_key() == [3, 3, 2, 4, 2]
    for key in OUTPUT_KEYS:
        expected = expected_output(module, key, weighted, pooling is PoolingType.MEAN)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(served[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_configs_report_d_columns() -> None:
    configs = MultiLayerEmbeddingBagCollection(tables(), device=META).embedding_bag_configs()
    assert [(each.name, each.embedding_dim) for each in configs] == [
        ("wide", 3), ("narrow", 2), ("single", 4), ("plain", 2)
    ]  # fmt: skip
    assert [each.hidden_dim for each in configs] == [7, 1, None, None]


def test_state_names_and_shapes() -> None:
    module = MultiLayerEmbeddingBagCollection(tables())
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "embedding_bags.wide.weight": (5, 7),
        "embedding_bags.narrow.weight": (5, 1),
        "embedding_bags.single.weight": (5, 4),
        "embedding_bags.plain.weight": (5, 2),
        "projections.wide.weight": (7, 3),
        "projections.narrow.weight": (1, 2),
    }


@pytest.mark.parametrize("rows", [5, 65_536 + 17])
def test_collapse_is_a_plain_collection_of_the_products(rows: int) -> None:
    module = MultiLayerEmbeddingBagCollection([table(n=rows, k=64), table("single", n=rows, k=None)], seed=1)
    collapsed = module.collapse()
    assert type(collapsed) is EmbeddingBagCollection
    assert [type(config) for config in collapsed.embedding_bag_configs()] == [EmbeddingBagConfig] * 2
    assert list(collapsed.state_dict()) == ["embedding_bags.t.weight", "embedding_bags.single.weight"]
    state = {name: value.double() for name, value in unsharded_weights(module).items()}
    first, second = state["embedding_bags.t.weight"], state["projections.t.weight"]
    rounding = 64 * 2**-24 * (first.abs() @ second.abs())
    found = collapsed.state_dict()["embedding_bags.t.weight"]
    assert ((found.double() - first @ second).abs() <= rounding).all()
    single = collapsed.state_dict()["embedding_bags.single.weight"]
    assert torch.equal(single, unsharded_weights(module)["embedding_bags.single.weight"])
    assert single.data_ptr() != module.embedding_bags["single"].weight.data_ptr()


def test_half_precision_rows_are_projected_in_float32() -> None:
    module = MultiLayerEmbeddingBagCollection([table(data_type=DataType.FP16, feature_names=["f1"])])
    rows = module.embedding_bags["t"].weight
    assert rows.dtype == torch.float16
    assert module.projections["t"].weight.dtype == module(features()).values().dtype == torch.float32
    product = unsharded_weights(module)["embedding_bags.t.weight"].double() @ module.projections["t"].weight.double()
    torch.testing.assert_close(module.collapse().embedding_bags["t"].weight.double(), product, rtol=1e-3, atol=1e-4)


def test_the_meta_device_allocates_nothing() -> None:
    module = MultiLayerEmbeddingBagCollection([table(n=1 << 40, k=64)], device=META)
    assert module.device == META
    for each in (module, module.rows(), module.collapse()):
        assert all(parameter.is_meta for parameter in each.parameters())
    assert module.collapse().embedding_bags["t"].weight.shape == (1 << 40, 3)


def test_copies_and_states_carry_both_layers() -> None:
    module = MultiLayerEmbeddingBagCollection(tables(), seed=3)
    duplicate, other = copy.deepcopy(module), MultiLayerEmbeddingBagCollection(tables(), seed=4)
    before = module(features()).values()
    assert torch.equal(duplicate(features()).values(), before)
    assert not torch.equal(other(features()).values(), before)
    with torch.no_grad():
        duplicate.projections["wide"].weight.zero_()
    assert torch.equal(module(features()).values(), before)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(features()).values(), before)


def test_reset_draws_both_layers_again() -> None:
    module = MultiLayerEmbeddingBagCollection(tables(), seed=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.reset_parameters()
    for name, value in MultiLayerEmbeddingBagCollection(tables(), seed=3).state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.parametrize("dimension", ["num_embeddings", "embedding_dim", "hidden_dim"])
def test_a_dimension_below_one_names_the_table(dimension: str) -> None:
    sizes = {"num_embeddings": 5, "embedding_dim": 3, "hidden_dim": 7, dimension: 0}
    with pytest.raises(ValueError, match=f"^table 't7': {dimension} is 0, it must be at least 1$"):
        MultiLayerEmbeddingBagConfig(name="t7", **sizes)


def test_a_zero_first_row_does_not_go_with_an_init_fn() -> None:
    with pytest.raises(ValueError, match=r"^table 't7': zero_first_row cannot go with an init_fn$"):
        MultiLayerEmbeddingBagConfig(
            name="t7", num_embeddings=5, embedding_dim=4, init_fn=torch.nn.init.ones_, zero_first_row=True
        )


def test_two_tables_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        MultiLayerEmbeddingBagCollection([table("twice"), table("twice", n=9)])


def test_initial_scales() -> None:
    def weights(**more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        module = MultiLayerEmbeddingBagCollection([table(n=2500, d=100, k=64, **more)])
        return module.embedding_bags["t"].weight.detach(), module.projections["t"].weight.detach()

    rows, projection = weights()
    assert 0.0199 < float(rows.abs().max()) <= 0.02  # 1/sqrt(2500)
    assert float(projection.std()) == pytest.approx(1 / math.sqrt(64), rel=0.03)
    rows, projection = weights(rows_init_std=0.5, projection_init_std=0.25)
    assert float(rows.std()) == pytest.approx(0.5, rel=0.03)
    assert float(projection.std()) == pytest.approx(0.25, rel=0.03)
    rows, _ = weights(weight_init_min=1.0, weight_init_max=3.0)
    assert 1 <= float(rows.min()) < 1.001 < 2.999 < float(rows.max()) <= 3


def test_an_init_fn_of_the_users_own_is_used() -> None:
    own = [
        table("mine", feature_names=["f1"], init_fn=lambda weight: weight.data.fill_(2)),
        EmbeddingBagConfig(5, 3, name="plain", init_fn=lambda weight: weight.data.fill_(3)),
        EmbeddingBagConfig(500, 3, name="partial", init_fn=partial(torch.nn.init.uniform_, a=10.0, b=11.0)),
    ]
    drawn = MultiLayerEmbeddingBagCollection(own).state_dict()
    assert (drawn["embedding_bags.mine.weight"] == 2).all()
    assert (drawn["embedding_bags.plain.weight"] == 3).all()
    values = drawn["embedding_bags.partial.weight"]
    assert 10 <= float(values.min()) < 10.1 < 10.9 < float(values.max()) <= 11


def test_an_init_fn_fills_rows_by_id() -> None:
    pretrained = torch.randn(20_000, 4)
    own = [table(n=20_000, d=4, k=None, feature_names=["f1"], init_fn=lambda weight: weight.copy_(pretrained))]
    module = MultiLayerEmbeddingBagCollection(own)
    assert torch.equal(module.collapse().embedding_bags["t"].weight, pretrained)
    assert not torch.equal(module.embedding_bags["t"].weight, pretrained)


def test_a_table_without_features_takes_the_feature_of_its_name() -> None:
    plain = EmbeddingBagConfig(num_embeddings=5, embedding_dim=3, name="f2")
    module = MultiLayerEmbeddingBagCollection([table("f1"), plain])
    assert module(features()).keys() == ["f1", "f2"]


@pytest.mark.parametrize("name", ["items", "type", "a.b", ""])
def test_a_name_that_no_torch_module_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"table {name!r}: no module of torch can have this name"):
        MultiLayerEmbeddingBagCollection([table(name)], device=META)
