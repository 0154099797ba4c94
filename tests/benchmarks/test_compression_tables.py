"""The tables of benchmarks/compression_arms.py: their gradients, their moves, and their bytes."""

import numpy as np
import pytest
import torch

from benchmarks.compression_tables import EPS, Layout, Tables, allocate, rank

SIZES = (40, 7)
LAYOUT = Layout(SIZES, 4, (8, 4, 2, 0), (True, False, True, False))


def _classes() -> np.ndarray:
    return np.arange(sum(SIZES)) % 4


def test_update_is_adagrad_of_autograd() -> None:
    torch.manual_seed(0)
    tables = Tables(LAYOUT, _classes())
    ids = torch.stack([torch.randint(40, (16,)), 40 + torch.randint(7, (16,))], dim=1)
    target = torch.randn(16, 2, 4)
    weight = tables.weight.clone().requires_grad_()
    w2 = [None if each is None else each.clone().requires_grad_() for each in tables.projections]
    vectors = torch.stack(
        [
            torch.stack([_vector(weight[i], int(tables.classes[i]), w2, table) for table, i in enumerate(row)])
            for row in ids.tolist()
        ]
    )
    found = tables.lookup(ids)
    torch.testing.assert_close(found, vectors.detach())
    (vectors * target).sum().backward()
    tables.update(target, rate=0.1, projection_rate=0.1, rate_power=0.0)
    for new, old in ((tables.weight, weight), (tables.projections[0], w2[0]), (tables.projections[2], w2[2])):
        expected = old.detach() - 0.1 * old.grad / (old.grad.abs() + EPS)
        torch.testing.assert_close(new, expected, atol=1e-4, rtol=1e-3)


def _vector(row: torch.Tensor, c: int, w2: list[torch.Tensor | None], table: int) -> torch.Tensor:
    width, second = LAYOUT.widths[c], w2[c]
    if width == 0:
        return torch.zeros(4)
    return row[:width] if second is None else row[:width] @ second[table]


def test_rows_that_move_to_d_columns_or_more_keep_their_vectors() -> None:
    torch.manual_seed(0)
    tables = Tables(LAYOUT, _classes())
    before = tables.vectors()
    new = np.where(_classes() == 3, 3, (_classes() + 1) % 2)  # 8 -> 4, 4 -> 8, 2 -> 4
    assert tables.move(new, "fit") == (_classes() != new).sum()
    torch.testing.assert_close(tables.vectors(), before, atol=1e-4, rtol=1e-3)


def test_rows_that_lose_columns_below_d_keep_the_nearest_vector() -> None:
    torch.manual_seed(0)
    tables = Tables(LAYOUT, np.ones(sum(SIZES), dtype=np.int64))
    before = tables.vectors()
    tables.move(np.full(sum(SIZES), 2), "fit")
    rest = before - tables.vectors()
    w2 = tables.projections[2]
    assert w2 is not None
    torch.testing.assert_close(rest[:40] @ w2[0].T, torch.zeros(40, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("all_projections", [False, True])
@pytest.mark.parametrize("budget", [1000, 700])
def test_allocation_is_within_budget_and_in_order_of_counts(budget: int, all_projections: bool) -> None:
    layout = Layout(SIZES, 4, (4, 2, 0), (False, True, False))
    counts = np.concatenate([np.arange(40, 0, -1.0), np.arange(7, 0, -1.0) - 0.5])
    classes = allocate(layout, counts, budget, 0.5, all_projections)
    assert 0.8 * budget < layout.training_bytes(classes, all_projections) <= budget
    assert (np.diff(classes[:40]) >= 0).all()


def test_ranking_fills_the_classes_and_favours_rows_that_are_there() -> None:
    layout = Layout((4,), 4, (4, 0), (False, False))
    now, capacity = np.array([0, 0, 1, 1]), np.array([[2, 2]])
    utility = np.array([1.0, 3.0, 1.1, 0.0])
    assert rank(layout, utility, now, capacity, 0.2, True).tolist() == [0, 0, 1, 1]
    assert rank(layout, utility, now, capacity, 0.0, True).tolist() == [1, 0, 0, 1]
