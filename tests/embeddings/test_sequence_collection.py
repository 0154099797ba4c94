from typing import Any

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagConfig,
    MultiLayerEmbeddingCollection,
    MultiLayerEmbeddingConfig,
)
from tests.helpers.sharded_module import unsharded_weights

IDS = {"other": [[4], [], [1]], "history": [[3, 0, 3, 1], [], [2, 2]], "item": [[1], [4], []]}
OUTPUT = {"history": "products", "item@products": "products", "item@plain": "plain", "other": "single"}


def table(name: str, k: int | None, features: list[str], d: int = 3, **more: Any) -> MultiLayerEmbeddingConfig:
    return MultiLayerEmbeddingConfig(
        name=name, num_embeddings=5, embedding_dim=d, hidden_dim=k, feature_names=features, **more
    )


def tables() -> list[EmbeddingConfig]:
    return [
        table("products", 7, ["history", "item"]),
        EmbeddingConfig(name="plain", num_embeddings=5, embedding_dim=3, feature_names=["item"]),
        table("single", None, ["other"]),
    ]


def batch(weighted: bool = False) -> KeyedJaggedTensor:
    ids = [each for rows in IDS.values() for row in rows for each in row]
    return KeyedJaggedTensor(
        list(IDS),
        torch.tensor(ids),
        torch.rand(len(ids)) if weighted else None,
        lengths=torch.tensor([len(row) for rows in IDS.values() for row in rows]),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_the_product_come_in_the_order_of_the_ids(weighted: bool) -> None:
    module = MultiLayerEmbeddingCollection(tables(), seed=3, need_indices=True)
    state = {name: value.double() for name, value in unsharded_weights(module).items()}
    assert isinstance(module, EmbeddingCollectionInterface)
    assert list(state) == [
        "embeddings.products.weight",
        "embeddings.plain.weight",
        "embeddings.single.weight",
        "projections.products.weight",
    ]
    plain = module.collapse()
    assert type(plain) is EmbeddingCollection
    found, served = module(batch(weighted)), plain(batch(weighted))
    assert [*found] == [*served] == ["history", "item@products", "item@plain", "other"]
    for key, name in OUTPUT.items():
        rows = IDS[key.split("@")[0]]
        ids = torch.tensor([each for row in rows for each in row])
        product = state[f"embeddings.{name}.weight"]
        if name == "products":
            product = product @ state["projections.products.weight"]
        assert product.abs().max() > 0.01
        for output in (found[key], served[key]):
            torch.testing.assert_close(output.values().double(), product[ids], rtol=1e-5, atol=1e-6)
            assert output.lengths().tolist() == [len(row) for row in rows]
            assert torch.equal(output.weights(), ids)


def test_gradients_equal_those_of_the_product() -> None:
    module = MultiLayerEmbeddingCollection(tables(), seed=3)
    history = module(batch())["history"]
    factors = torch.arange(1, 19, dtype=torch.float32).view(6, 3)
    (history.values() * factors).sum().backward()
    ids = torch.tensor([3, 0, 3, 1, 2, 2])
    state = {name: value.double().requires_grad_() for name, value in unsharded_weights(module).items()}
    product = state["embeddings.products.weight"] @ state["projections.products.weight"]
    (product[ids] * factors).sum().backward()
    order = module.row_tables()[0].row_order
    assert order is not None
    assert history.weights_or_none() is None
    found = module.row_weight("products").grad
    assert found is not None
    # Gradients are float32, and sums differ in the last places by the machine's kernels.
    torch.testing.assert_close(order.from_stored(found), state["embeddings.products.weight"].grad.float())
    found = module.get_parameter("projections.products.weight").grad
    assert found is not None
    torch.testing.assert_close(found, state["projections.products.weight"].grad.float())


def test_initial_values_are_those_of_a_collection_of_bags_and_are_drawn_again() -> None:
    module = MultiLayerEmbeddingCollection(tables(), seed=3)
    bags = MultiLayerEmbeddingBagCollection(
        [
            MultiLayerEmbeddingBagConfig(
                name="products", num_embeddings=5, embedding_dim=3, hidden_dim=7, feature_names=["history"]
            )
        ],
        seed=3,
    )
    drawn = module.row_weight("products").detach().clone()
    assert torch.equal(drawn, bags.row_weight("products"))
    assert torch.equal(module.projections["products"].weight, bags.projections["products"].weight)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.reset_parameters()
    assert torch.equal(module.row_weight("products"), drawn)
    assert all(bool(parameter.any()) for parameter in module.parameters())


def test_half_precision_rows_and_the_meta_device() -> None:
    half = MultiLayerEmbeddingCollection([table("t", 8, ["history"], data_type=DataType.FP16)])
    assert half.row_weight("t").dtype == torch.float16
    assert half(batch())["history"].values().dtype == torch.float32
    meta = MultiLayerEmbeddingCollection(tables(), torch.device("meta"))
    assert {each.device.type for each in meta.parameters()} == {"meta"}
    assert {each.device.type for each in meta.collapse().parameters()} == {"meta"}


def test_what_is_no_collection_of_sequences_is_refused() -> None:
    bag = MultiLayerEmbeddingBagConfig(name="t", num_embeddings=5, embedding_dim=3, feature_names=["f"])
    with pytest.raises(ValueError, match="table 't': has pooling SUM, but its rows are not pooled here"):
        MultiLayerEmbeddingCollection([bag])
    bag.pooling = PoolingType.NONE
    with pytest.raises(ValueError, match="table 't': is not pooled; put it into a MultiLayerEmbeddingCollection"):
        MultiLayerEmbeddingBagCollection([bag])
    with pytest.raises(ValueError, match="table 'wide': embedding_dim is 4, and that of table 'narrow' is 3"):
        MultiLayerEmbeddingCollection([table("narrow", 7, ["f"]), table("wide", 7, ["g"], d=4)])
    with pytest.raises(ValueError, match="table 't': hidden_dim is 0"):
        table("t", 0, ["f"])
    module = MultiLayerEmbeddingCollection(tables())
    broken = batch()
    broken.values()[3] = 5
    with pytest.raises(ValueError, match=r"table 'products': feature 'history': id 5 is outside \[0, 5\)"):
        module(broken)
    state = module.state_dict() | {"projections.products.weight": torch.zeros(6, 3)}
    with pytest.raises(ValueError, match="table 'products': W1 has 7 columns and W2 has 6 rows"):
        module.load_state_dict(state)
