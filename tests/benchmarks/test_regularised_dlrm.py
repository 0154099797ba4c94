"""The penalty of the study's arms is decay/2 · mean of ‖v‖², and vectors are no longer than max_norm."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.regularised_dlrm import RegularisedSparseArch, build
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.models.build import build_training_model
from mlet_dist.models.builder import ModelInputs
from mlet_dist.models.network_check import check_network, tracing_problem
from mlet_dist.models.spec import ModelSpec

IDS = KeyedJaggedTensor(["a", "b"], torch.tensor([0, 1, 1, 2, 2, 0]), lengths=torch.ones(6, dtype=torch.int64))


def tables() -> EmbeddingBagCollection:
    torch.manual_seed(0)
    configs = [EmbeddingBagConfig(3, 4, name=name, feature_names=[name]) for name in ("a", "b")]
    return EmbeddingBagCollection(tables=configs)


def gradients_of(loss: torch.Tensor, collection: EmbeddingBagCollection) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(collection.parameters())))


def test_decay_is_the_gradient_of_its_penalty() -> None:
    collection = tables()
    weights = torch.randn(3, 2, 4)
    vectors = RegularisedSparseArch(collection, 0.5, None)(IDS)
    plain = RegularisedSparseArch(collection, 0.0, None)(IDS)
    assert torch.equal(vectors, plain)
    loss = (plain * weights).sum() + 0.5 / 2 * plain.square().sum() / 3
    for found, expected in zip(
        gradients_of((vectors * weights).sum(), collection), gradients_of(loss, collection), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_rows_that_the_loss_does_not_depend_on_have_no_penalty() -> None:
    collection = tables()
    vectors = RegularisedSparseArch(collection, 0.5, None)(IDS)
    plain = RegularisedSparseArch(collection, 0.0, None)(IDS)
    loss = plain[:2].sum() + 0.5 / 2 * plain[:2].square().sum() / 2  # the third row is padding
    for found, expected in zip(
        gradients_of(vectors[:2].sum(), collection), gradients_of(loss, collection), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("arguments", [{"decay": 0.01}, {"max_norm": 0.5}])
def test_a_run_may_have_this_network(arguments: dict[str, float]) -> None:
    settings = ModelConfig(
        builder="benchmarks.regularised_dlrm:build", arguments=arguments, embedding_dim=4, hidden_dim=8
    )
    spec = ModelSpec(settings, ("I1", "I2"), (SparseFeature("C1", 10), SparseFeature("C2", 20)), seed=0)
    model = build_training_model(spec, torch.device("meta"))
    check_network(model, 2)
    assert tracing_problem(model) is None


def test_vectors_are_cut_to_the_largest_norm() -> None:
    plain = RegularisedSparseArch(tables(), 0.0, None)(IDS)
    norms = plain.norm(dim=2)
    limit = float(norms.detach().median())
    cut = RegularisedSparseArch(tables(), 0.0, limit)(IDS)
    torch.testing.assert_close(cut.norm(dim=2), norms.clamp(max=limit))
    torch.testing.assert_close(cut[norms < limit], plain[norms < limit])


def test_other_arguments_are_refused() -> None:
    settings = ModelConfig(embedding_dim=4, hidden_dim=None, arguments={"decya": 1})
    inputs = ModelInputs(tables(), None, ("I1",), ("a", "b"), (), {"a": 4, "b": 4}, settings)
    with pytest.raises(ValueError, match="decya: expected decay or max_norm"):
        build(inputs)


@pytest.mark.parametrize(
    ("decay", "max_norm", "message"),
    [(-0.1, None, "decay: expected at least 0, found -0.1"), (0.0, 0.0, "max_norm: expected a number above 0")],
)
def test_values_out_of_range_are_refused(decay: float, max_norm: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegularisedSparseArch(tables(), decay, max_norm)
