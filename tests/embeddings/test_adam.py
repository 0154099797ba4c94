"""LazyAdam's two ways to update rows: bitwise the same, and one of them never waits for the device."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlet_dist.embeddings import LazyAdam
from mlet_dist.embeddings.adam import _step_by_mask, _step_looked_up_rows

GROUP = {"betas": (0.9, 0.999), "eps": 1e-8, "lr": 0.013}


def _reference(weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Update row by row, each in tensors of its own."""
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    for row in range(len(weight)):
        if not bool((gradient[row] != 0).any()):
            continue
        of_row = gradient[row].clone()
        mean = state["exp_avg"][row].mul_(beta1).add_(of_row, alpha=1 - beta1)
        square = state["exp_avg_sq"][row].mul_(beta2).addcmul_(of_row, of_row, value=1 - beta2)
        divisor = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight[row].add_(mean / divisor, alpha=-group["lr"] / (1 - beta1**step))


def _state(rows: int, columns: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    zeros = {name: torch.zeros(rows, columns, device=device) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(0), **zeros}


def _sparse_gradient(rows: int, columns: int, share: float, generator: torch.Generator) -> torch.Tensor:
    gradient = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(-8, 4, (rows, 1)).float()
    gradient[torch.rand(rows, generator=generator) >= share] = 0
    gradient[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return gradient


@pytest.mark.parametrize("update", [_step_looked_up_rows, _step_by_mask])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (1, 4), (37, 4), (101, 12), (64, 64), (29, 132)])
def test_both_ways_give_the_bits_of_row_by_row_updates(rows: int, columns: int, share: float, update: Any) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    expected, state, expected_state = weight.clone(), _state(rows, columns), _state(rows, columns)
    for _ in range(7):
        gradient = _sparse_gradient(rows, columns, share, generator)
        for each in (state, expected_state):
            each["step"] += 1
        update(weight, gradient.clone(), state, GROUP)
        _reference(expected, gradient, expected_state, GROUP)
    assert torch.equal(weight, expected)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], expected_state[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_own_row_alone(value: float) -> None:
    for update in (_step_looked_up_rows, _step_by_mask):
        weight, state = torch.ones(3, 4), _state(3, 4)
        state["step"] += 1
        gradient = torch.zeros(3, 4)
        gradient[1, 2] = value
        update(weight, gradient, state, GROUP)
        assert weight.isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_step_on_a_gpu_copies_nothing_to_the_host() -> None:
    """FakeTensors have no values, so that any copy of a value to the host raises."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(30, 8, device="cuda"))
        optimizer = LazyAdam([weight])
        weight.grad = torch.empty(30, 8, device="cuda")
        optimizer.state[weight]["step"] = 4
        optimizer.step()
        with pytest.raises(RuntimeError):  # the number of looked-up rows is not known without values
            _step_looked_up_rows(weight.detach(), weight.grad, optimizer.state[weight], GROUP)
