"""Models at smaller widths: masked, and with the weights that are left, they are the plain model of that width."""

import dataclasses
from typing import get_args

import pytest
import torch

from mlet_dist.config.model_section import ModelName
from mlet_dist.models.build import build_serving_model, build_training_model
from mlet_dist.models.column_slices import layer_slices, sliced
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.spec import ONE_LABEL, TABLES_PREFIX, ModelSpec
from tests.helpers.rows_by_id import model_by_id
from tests.models.test_architectures import CPU, MODEL, ROWS, SPEC, inputs

D, DIMS = 12, (4, 8)


def nested_spec(name: ModelName, labels: tuple[str, ...] = ONE_LABEL) -> ModelSpec:
    model = dataclasses.replace(MODEL, name=name, embedding_dim=D, nested_dims=DIMS)
    return dataclasses.replace(SPEC, model=model, labels=labels)


def plain_at(spec: ModelSpec, state: dict[str, torch.Tensor], width: int) -> torch.nn.Module:
    """Return TorchRec's network of ``embedding_dim`` width with the first columns of tables and layers."""
    narrow = build_serving_model(spec.with_embedding_dim(width))
    slices = layer_slices(spec, width)
    own = {}
    for key, tensor in narrow.state_dict().items():
        if key.startswith(TABLES_PREFIX):
            product = state[key] @ state[key.replace("embedding_bags", "projections")]
            own[key] = product[:, :width]
        else:
            own[key] = sliced(state[key], slices[key]) if key in slices else state[key]
        assert own[key].shape == tensor.shape
    narrow.load_state_dict(own)
    return narrow


@pytest.mark.parametrize(
    ("name", "labels"),
    [*((name, ONE_LABEL) for name in get_args(ModelName)), ("dlrm", ("click", "buy")), ("dlrm_dcn", ("click", "buy"))],
)
def test_a_masked_network_is_the_plain_one_of_that_width(name: ModelName, labels: tuple[str, ...]) -> None:
    spec = nested_spec(name, labels)
    model = build_training_model(spec, CPU)
    state = model_by_id(model.state_dict(), spec)
    whole = model(*inputs())
    nested = NestedWidths.of(spec, model)
    assert nested is not None
    assert nested.widths == (12, 8, 4)
    found = nested.at_all(model, *inputs())
    for width, logits in zip(nested.widths[1:], found[1:], strict=True):
        expected = plain_at(spec, state, width)(*inputs())
        assert float((expected - whole).detach().abs().max()) > 1e-3  # the width matters
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(nested.at_width(model, *inputs(), torch.tensor([width])), logits)
    torch.testing.assert_close(found[0], whole)
    assert torch.equal(model(*inputs()), whole)  # any other call is that of the whole model


def test_rows_have_widths_of_their_own_and_no_gradient_beyond() -> None:
    spec = nested_spec("dlrm")
    model = build_training_model(spec, CPU)
    nested = NestedWidths.of(spec, model)
    assert nested is not None
    widths = torch.tensor([4, 12, 8])[torch.arange(ROWS) % 3]
    logits = nested.at_width(model, *inputs(), widths)
    of_all = dict(zip(nested.widths, nested.at_all(model, *inputs()), strict=True))
    expected = torch.stack([of_all[int(width)][row] for row, width in enumerate(widths)])
    torch.testing.assert_close(logits, expected)
    nested.at_width(model, *inputs(), torch.tensor([4])).sum().backward()
    for key, parameter in model.named_parameters():
        if "projections" in key:
            assert parameter.grad is not None
            assert float(parameter.grad[:, :4].abs().max()) > 0
            assert float(parameter.grad[:, 4:].abs().max()) == 0
        if key in ("dense_arch.model._mlp.2._linear.weight", "dense_arch.model._mlp.2._linear.bias"):
            assert parameter.grad is not None
            assert float(parameter.grad[4:].abs().max()) == 0
    left = layer_slices(spec, 4)["over_arch.model.0._mlp.0._linear.weight"]
    assert left[0] is None
    assert left[1] is not None
    over = model.get_parameter("over_arch.model.0._mlp.0._linear.weight").grad
    assert over is not None
    rest = [column for column in range(over.shape[1]) if column not in left[1].tolist()]
    assert rest == list(range(4, 12))
    assert float(over[:, rest].abs().max()) == 0
