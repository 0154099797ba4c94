"""Factors of a table from its Gram matrix: the product is the table, and both layers can learn."""

import math

import pytest
import torch

from mlet_dist.embeddings.factors import Factors, factors_of

_GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


def _rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(_random(d, d).double())[0].float()


# Table, and how many directions of it are above 1e-7 of the largest.
TABLES = {
    "of full rank": (_random(500, 12), 12),
    "ill-conditioned": (_random(500, 12) * torch.logspace(0, -5, 12) @ _rotation(12), 12),
    "beyond float32": (_random(500, 12) * torch.logspace(0, -22, 12), 4),
    "rank-deficient": (_random(500, 5) @ _random(5, 12), 5),
    "fewer rows than columns": (_random(7, 12), 7),
    "one row": (_random(1, 12), 1),
    "zero": (torch.zeros(30, 12), 0),
    "zero but for one value": (torch.nn.functional.one_hot(torch.tensor([3] + 9 * [0]), 12)[:, 1:].float(), 1),
    "tiny": (1e-18 * _random(500, 12), 12),
    "huge": (1e18 * _random(500, 12), 12),
    "half": (_random(500, 12).half(), 12),
}


def _factors(table: torch.Tensor, hidden_dim: int, gain: float | None = None) -> tuple[torch.Tensor, Factors]:
    factors = factors_of(table.double().T @ table.double(), hidden_dim, "t", seed=3, gain=gain)
    return (table.double() @ factors.to_rows).float(), factors


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("wider", [0, 1, 36])
@pytest.mark.parametrize("gain", [None, 4.0])
def test_the_product_is_the_table_to_the_rounding_of_float32(name: str, wider: int, gain: float | None) -> None:
    table, rank = TABLES[name]
    d = table.shape[1]
    rows, factors = _factors(table, d + wider, gain)
    assert factors.rank == rank if name != "ill-conditioned" else factors.rank == 12
    assert rows.shape == (len(table), d + wider)
    assert factors.projection.shape == (d + wider, d)
    product = rows.double() @ factors.projection.double()
    assert _relative(product, table) < 1e-7
    for row, expected in zip(product, table, strict=True):  # including rows that are small compared with others
        assert _relative(row, expected) < 1e-6


@pytest.mark.parametrize("name", TABLES)
def test_balanced_where_the_table_is_and_able_to_learn_elsewhere(name: str) -> None:
    table, rank = TABLES[name]
    d, k = table.shape[1], 4 * table.shape[1]
    rows, factors = _factors(table, k)
    one = (rows.double().T @ rows.double())[:rank, :rank]
    other = (factors.projection.double() @ factors.projection.double().T)[:rank, :rank]
    assert _relative(one, other) < 1e-6
    expected = torch.linalg.svdvals(table.double())[:rank]
    torch.testing.assert_close(other.diagonal(), expected, rtol=1e-6, atol=0)
    # Where the table's singular value is zero, W1 is zero, and W2 has the scale of random initialization.
    assert rows[:, d:].abs().max() == 0
    lengths = factors.projection[rank:].norm(dim=1)
    assert math.sqrt(d / k) / 3 < lengths.min()
    assert lengths.max() < 3 * math.sqrt(d / k)


def test_singular_values_are_those_of_the_table() -> None:
    table, _ = TABLES["ill-conditioned"]
    _, factors = _factors(table, 12)
    expected = torch.linalg.svdvals(table.double())
    torch.testing.assert_close(factors.singular_values, expected, rtol=1e-6, atol=1e-7 * float(expected[0]))


@pytest.mark.parametrize("name", ["of full rank", "rank-deficient", "zero", "huge"])
def test_gain_is_the_mean_of_the_projections_square(name: str) -> None:
    table, _ = TABLES[name]
    for gain in (0.25, 1.0, 16.0):
        _, factors = _factors(table, 48, gain)
        mean = float(factors.projection.double().square().sum()) / 12
        assert mean == pytest.approx(gain, rel=0.15)  # 36 of 48 rows are drawn at random


def test_the_same_seed_and_name_draw_the_same_rows() -> None:
    table, _ = TABLES["of full rank"]
    gram = table.double().T @ table.double()
    first, again = (factors_of(gram, 20, "t", 1).projection for _ in range(2))
    assert torch.equal(first, again)
    for other in (factors_of(gram, 20, "t", 2), factors_of(gram, 20, "u", 1)):
        assert torch.equal(other.projection[:12], first[:12])
        assert not torch.equal(other.projection[12:], first[12:])


def test_what_has_no_exact_factors_is_refused() -> None:
    with pytest.raises(
        ValueError, match="table 't': hidden_dim is 11 and the table has 12 columns; exact factors need"
    ):
        factors_of(torch.eye(12, dtype=torch.float64), 11, "t", 0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="table 't': holds values that are not finite"):
            factors_of(torch.full((2, 2), wrong, dtype=torch.float64), 2, "t", 0)
