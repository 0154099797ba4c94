"""Distinct keys as torch.unique finds them, and the rows of all keys and their gradients as index_select has them."""

import dataclasses

import pytest
import torch

from benchmarks.step_counters import count_step_operations
from mlet_dist.embeddings.sharded.occurrences import Occurrences, pool, sorted_distinct

LIMITS = [20, (1 << 31) - 1, 1 << 31, 1 << 40]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("keys", [[], [7], [5, 5, 5], [3, 1, 2], [9, 0, 9, 4, 0, 4, 4, 8], [20, 3, 20]])
def test_distinct_keys_are_those_of_unique(keys: list[int], limit: int) -> None:
    given = torch.tensor([limit if key == 20 else key for key in keys], dtype=torch.int64)
    with count_step_operations() as counts:
        distinct, found = sorted_distinct(given, limit)
    assert counts.synchronisation_calls == []
    expected, inverse = torch.unique(given, return_inverse=True)
    assert distinct.dtype == torch.int64
    assert distinct.tolist() == expected.tolist() + [limit] * (len(keys) - len(expected))
    assert torch.equal(found.position, inverse)
    assert torch.equal(found.order, inverse.argsort(stable=True))
    assert found.starts is not None
    number = len(expected)
    assert found.starts[:number].tolist() == [
        inverse.tolist().count(0) and int((inverse < each).sum()) for each in range(number)
    ]
    assert found.starts[number:].tolist() == [len(keys)] * (len(keys) + 2 - number)


def drawn(number: int, distinct: int, seed: int) -> tuple[Occurrences, int]:
    """Return occurrences of up to ``distinct`` keys among ``number`` keys, and how many different ones there are."""
    keys = torch.randint(distinct, (number,), generator=torch.Generator().manual_seed(seed))
    return sorted_distinct(keys, distinct)[1], len(keys.unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beside", [0, 1])
@pytest.mark.parametrize(("number", "distinct"), [(1, 1), (30, 1), (30, 7), (1000, 900), (5000, 40)])
def test_rows_and_their_gradients_are_those_of_index_select(
    number: int, distinct: int, beside: int, dtype: torch.dtype
) -> None:
    occurrences, different = drawn(number, distinct, seed=number)
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(different + beside, 16, generator=draw).to(dtype).requires_grad_()
    above = torch.randn(number, 16, generator=draw).to(dtype)
    found, expected = occurrences.rows(rows), rows.index_select(0, occurrences.position)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found, rows, above)
    (of_index_select,) = torch.autograd.grad(expected, rows, above)
    if dtype == torch.bfloat16:  # index_select rounds each of its sums to bfloat16
        exact = torch.zeros(rows.shape, dtype=torch.float64).index_add_(0, occurrences.position, above.double())
        torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=2**-6)
    else:
        assert torch.equal(gradient, of_index_select)
    assert not beside or gradient[-1].eq(0).all()


def test_no_keys_have_no_rows_and_a_gradient_of_zeros() -> None:
    _, occurrences = sorted_distinct(torch.zeros(0, dtype=torch.int64), 9)
    row = torch.ones(1, 4, requires_grad=True)
    found = occurrences.rows(row)
    assert found.shape == (0, 4)
    (gradient,) = torch.autograd.grad(found.sum(), row)
    assert gradient.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("size", [1, 3, 10, 30])
def test_the_transpose_has_the_keys_in_the_other_order(size: int) -> None:
    occurrences, different = drawn(30, 7, seed=size)
    rows = torch.randn(different, 2, requires_grad=True)
    transposed = occurrences.transposed(size)
    found = transposed.rows(rows)
    expected = occurrences.rows(rows).view(size, -1, 2).transpose(0, 1).reshape(-1, 2)
    assert torch.equal(found, expected)
    above = torch.randn(30, 2)
    (gradient,) = torch.autograd.grad(found, rows, above)
    (of_expected,) = torch.autograd.grad(expected, rows, above)
    torch.testing.assert_close(gradient, of_expected)


@pytest.mark.parametrize("beside", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("features", "batch_size", "most"), [(1, 1, 3), (1, 40, 5), (4, 1, 9), (5, 33, 12), (3, 7, 0)])
@pytest.mark.parametrize("lengths_dtype", [torch.int32, torch.int64])
def test_pooled_rows_and_their_gradients_against_float64(
    features: int, batch_size: int, most: int, weighted: bool, beside: int, lengths_dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(features * batch_size)
    lengths = torch.randint(0, most + 1, (features * batch_size,), generator=draw).to(lengths_dtype)
    number = int(lengths.sum())
    occurrences, different = drawn(number, 12, seed=4)
    beside = max(beside, int(not different))  # an empty table is padded
    rows = torch.randn(different + beside, 8, generator=draw).requires_grad_()
    weights = torch.rand(number, generator=draw) if weighted else None
    above = torch.randn(batch_size, features * 8, generator=draw)
    exact = rows.detach().double().requires_grad_()
    expected = torch.zeros(batch_size, features, 8, dtype=torch.float64)
    at = 0
    for bag, length in enumerate(lengths.tolist()):
        for key in range(at, at + length):
            share = 1.0 if weights is None else float(weights[key])
            expected[bag % batch_size, bag // batch_size] += share * exact[occurrences.position[key]].detach()
        at += length
    found = occurrences.pooled(rows, lengths, weights, features)
    torch.testing.assert_close(found.double(), expected.view(batch_size, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, pool(rows, occurrences.position, lengths, weights, features))
    (gradient,) = torch.autograd.grad(found, rows, above)
    pooled = pool(exact, occurrences.position, lengths, None if weights is None else weights.double(), features)
    (of_float64,) = torch.autograd.grad(pooled, exact, above.double())
    torch.testing.assert_close(gradient.double(), of_float64, rtol=1e-5, atol=1e-5)


def test_weights_that_are_learned_have_gradients() -> None:
    occurrences, different = drawn(20, 7, seed=1)
    rows, weights = torch.randn(different, 8, requires_grad=True), torch.rand(20, requires_grad=True)
    found = occurrences.pooled(rows, torch.full((10,), 2), weights, 2)
    gradient, of_weights = torch.autograd.grad(found.square().sum(), (rows, weights))
    assert gradient.abs().sum() > 0
    assert of_weights.abs().sum() > 0


def test_on_cuda_the_gradient_is_that_of_index_select() -> None:
    occurrences, different = drawn(30, 7, seed=0)
    rows = torch.randn(different, 2, requires_grad=True)
    found = dataclasses.replace(occurrences, order=None, starts=None).transposed(3).rows(rows)
    assert type(found.grad_fn).__name__ == "IndexSelectBackward0"
