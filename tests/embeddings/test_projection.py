import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedTensor

from mlet_dist.embeddings import projection as projection_module
from mlet_dist.embeddings.products import _SavedVectors
from mlet_dist.embeddings.projection import FEW_ROWS, Projection, project, project_rows, project_tables, split_flat

# One key of the KeyedTensor: (k, d), or (d, None) for a single-layer table.
widths = st.sampled_from([(8, 4), (8, 4), (8, 2), (2, 4), (1, 1), (3, 5), (4, None), (1, None)])
layouts = st.lists(widths, min_size=1, max_size=7)
Layout = list[tuple[int, int | None]]
RowsProjected = Callable[[torch.Tensor, list[int], torch.Tensor], torch.Tensor]


def make_inputs(layout: Layout, rows: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, sum(width for width, _ in layout), generator=draw)
    weights = {f"f{i}": torch.randn(width, d, generator=draw) for i, (width, d) in enumerate(layout) if d is not None}
    return values, weights


def pooled(layout: Layout, values: torch.Tensor) -> KeyedTensor:
    return KeyedTensor([f"f{i}" for i in range(len(layout))], [width for width, _ in layout], values)


def reference(
    layout: Layout, values: torch.Tensor, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Return outputs by key, and the gradients of the sum of their cubes, computed key by key in float64."""
    values = values.double().requires_grad_()
    weights = {key: weight.double().requires_grad_() for key, weight in weights.items()}
    outputs, start = {}, 0
    for i, (width, _) in enumerate(layout):
        block = values[:, start : start + width]
        outputs[f"f{i}"] = block @ weights[f"f{i}"] if f"f{i}" in weights else block
        start += width
    sum((output**3).sum() for output in outputs.values()).backward()
    assert values.grad is not None
    gradients = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
    return {key: output.detach() for key, output in outputs.items()}, values.grad, gradients


def assert_within_rounding(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Allow a few float32 roundings of the largest element: a small element may be a difference of large terms."""
    assert found is not None
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * scale + 1e-6)


@given(layout=layouts, rows=st.integers(1, 5), seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_outputs_and_gradients_equal_one_product_per_key(layout: Layout, rows: int, seed: int) -> None:
    values, weights = make_inputs(layout, rows, seed)
    expected, values_grad, weight_grads = reference(layout, values, weights)
    values.requires_grad_()
    for weight in weights.values():
        weight.requires_grad_()
    found = project(pooled(layout, values), weights)
    assert found.keys() == list(expected)
    assert found.length_per_key() == [width if d is None else d for width, d in layout]
    for key, output in found.to_dict().items():
        assert_within_rounding(output, expected[key])
    (found.values() ** 3).sum().backward()
    assert_within_rounding(values.grad, values_grad)
    assert set(weight_grads) == set(weights)
    for key, weight in weights.items():
        assert_within_rounding(weight.grad, weight_grads[key])


def test_project_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 7.0, 3.0]])
    weights = {"a": torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), "c": torch.tensor([[5.0]])}
    found = project(KeyedTensor(["a", "b", "c"], [2, 1, 1], values), weights)
    assert found.values().tolist() == [[1, 2, 0, 7, 15]]
    assert found.offset_per_key() == [0, 3, 4, 5]
    assert found["c"].tolist() == [[15]]


def test_an_empty_batch_keeps_its_widths() -> None:
    layout: Layout = [(8, 4), (8, 4), (3, None)]
    values, weights = make_inputs(layout, 0, seed=1)
    assert project(pooled(layout, values), weights).values().shape == (0, 4 + 4 + 3)


def test_one_weight_under_two_keys_accumulates_both_gradients() -> None:
    values, weights = make_inputs([(3, 2), (3, 2)], 4, seed=2)
    shared = weights["f0"].requires_grad_()
    project(pooled([(3, 2), (3, 2)], values), {"f0": shared, "f1": shared}).values().sum().backward()
    expected = (values[:, :3] + values[:, 3:]).double().sum(dim=0)[:, None].expand(3, 2)
    torch.testing.assert_close(shared.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_weights_the_input_is_returned() -> None:
    values, _ = make_inputs([(4, None), (1, None)], 3, seed=3)
    given_tensor = pooled([(4, None), (1, None)], values)
    assert project(given_tensor, {}) is given_tensor


def test_the_input_is_not_changed() -> None:
    layout: Layout = [(8, 4), (3, None), (8, 4)]
    values, weights = make_inputs(layout, 3, seed=4)
    before = values.clone()
    project(pooled(layout, values), weights).values().zero_()
    assert torch.equal(values, before)


def test_a_projection_is_drawn_from_seed_and_table() -> None:
    def weight(table: str = "t", std: float = 0.25, seed: int = 0) -> torch.Tensor:
        return Projection(table, 200, 100, std, seed).weight.detach()

    assert weight().shape == (200, 100)
    assert weight().dtype == torch.float32
    assert torch.equal(weight(), weight())
    assert not torch.equal(weight(), weight(table="u"))
    assert not torch.equal(weight(), weight(seed=1))
    for std in (0.25, 2.0):
        assert float(weight(std=std).mean()) == pytest.approx(0, abs=5 * std / math.sqrt(20_000))
        assert float(weight(std=std).std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(("k", "d"), [(64, 16), (16, 16), (8, 16), (1, 4), (4, 1)])
def test_an_orthogonal_projection_has_the_scale_of_a_normal_one(k: int, d: int) -> None:
    def weight(table: str = "t", std: float = 0.25, seed: int = 0) -> torch.Tensor:
        return Projection(table, k, d, std, seed, init="orthogonal").weight.detach().double()

    found = weight()
    gram = found.T @ found if k >= d else found @ found.T
    expected = max(k, d) * 0.25**2 * torch.eye(min(k, d), dtype=torch.float64)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-6)
    assert float(found.square().sum()) == pytest.approx(k * d * 0.25**2, rel=1e-6)
    torch.testing.assert_close(weight(std=1.0), 4 * found, rtol=1e-6, atol=0)
    assert torch.equal(weight(), found)
    if k * d > 16:
        assert not torch.allclose(weight(table="u"), found)
        assert not torch.allclose(weight(seed=1), found)


def test_orthogonal_projections_favour_no_direction() -> None:
    """The mean of many is zero, as that of a uniform distribution; QR alone would give positive diagonals."""
    drawn = torch.stack([Projection(f"t{i}", 4, 4, 0.5, 0, init="orthogonal").weight.detach() for i in range(2000)])
    assert float(drawn.mean(dim=0).abs().max()) < 5 * 0.5 / math.sqrt(2000)


def test_a_projection_can_be_reset_and_put_on_meta() -> None:
    projection = Projection("t", 4, 2, 0.5, seed=3)
    initial = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight.zero_()
    projection.reset_parameters()
    assert torch.equal(projection.weight, initial)
    meta = Projection("t", 1 << 40, 1 << 20, 0.5, seed=3, device=torch.device("meta"))
    meta.reset_parameters()
    assert meta.weight.is_meta


@pytest.mark.parametrize("method", [project_rows, projection_module._project_padded])
@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_rows_of_several_tables_against_float64(method: RowsProjected, counts: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), 8, generator=draw).requires_grad_()
    weights = torch.randn(len(counts), 8, 4, generator=draw).requires_grad_()
    exact_rows, exact_weights = (each.detach().double().requires_grad_() for each in (rows, weights))
    exact = torch.cat([part @ weight for part, weight in zip(exact_rows.split(counts), exact_weights, strict=True)])
    found = method(rows, counts, weights)
    assert found.shape == (sum(counts), 4)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(sum(counts), 4, generator=draw)
    found.backward(upstream)
    exact.backward(upstream.double())
    for gradient, expected in ((rows.grad, exact_rows.grad), (weights.grad, exact_weights.grad)):
        assert gradient is not None
        assert expected is not None
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def of_block(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    found = project(KeyedTensor(["a", "b"], [8, 8], values), {"a": weights[0], "b": weights[1]})
    return found.values()


def of_rows(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    number = values.numel() // 8
    (found,) = project_tables(values.view(-1), [3, number - 3], [8, 8], [4, 4], list(weights))
    return found


@pytest.fixture(params=[of_block, of_rows])
def method(request: pytest.FixtureRequest) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    found: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = request.param
    return found


def drawn(rows: int = FEW_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return torch.randn(rows, 16, generator=draw).requires_grad_(), torch.randn(2, 8, 4, generator=draw).requires_grad_()


@pytest.mark.parametrize("rows", [FEW_ROWS - 1, FEW_ROWS, 3 * FEW_ROWS])
@pytest.mark.parametrize("layout", [[(8, 4), (8, 4)], [(64, 16)] * 5, [(8, 4), (3, None), (8, 4), (2, 4)]])
def test_many_rows_against_float64(layout: Layout, rows: int) -> None:
    values, weights = make_inputs(layout, rows, seed=rows)
    upstream = torch.randn(rows, sum(width if d is None else d for width, d in layout))
    values.requires_grad_()
    for weight in weights.values():
        weight.requires_grad_()
    found = project(pooled(layout, values * 1), weights)
    found.values().backward(upstream)
    keys = {f"f{i}": width if d is None else d for i, (width, d) in enumerate(layout)}
    parts = zip(keys, values.split([width for width, _ in layout], 1), strict=True)
    above = dict(zip(keys, upstream.double().split(list(keys.values()), 1), strict=True))
    gradients = []
    for key, part in parts:
        rows_of_key = part.detach().double()
        if key not in weights:
            assert torch.equal(found[key], part)
            gradients.append(above[key])
            continue
        weight = weights[key].detach().double()
        assert_within(found[key], rows_of_key, weight)
        assert_within(weights[key].grad, rows_of_key.T, above[key])
        gradients.append(above[key] @ weight.T)
    assert_within_rounding(values.grad, torch.cat(gradients, dim=1))


def assert_within(found: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> None:
    """Compare a float32 product with that of float64 factors; its error is below a share of the sum of all terms."""
    assert found is not None
    assert ((found.double() - left @ right).abs() <= 32 * 2**-24 * (left.abs() @ right.abs())).all()


def test_gradients_of_looked_up_vectors_take_their_place(method: Callable[..., torch.Tensor]) -> None:
    leaf, weights = drawn()
    looked_up = leaf * 1
    seen: list[torch.Tensor] = []
    looked_up.register_hook(seen.append)
    method(looked_up, weights).square().sum().backward()
    (gradient,) = seen
    assert gradient.untyped_storage().data_ptr() == looked_up.untyped_storage().data_ptr()


def test_leaf_tensors_and_their_views_keep_their_values(method: Callable[..., torch.Tensor]) -> None:
    for view in (lambda leaf: leaf, lambda leaf: leaf[1:]):
        leaf, weights = drawn(FEW_ROWS + 1)
        before = leaf.detach().clone()
        method(view(leaf), weights).square().sum().backward()
        assert torch.equal(leaf.detach(), before)


def test_backward_may_run_twice_where_the_graph_is_retained(method: Callable[..., torch.Tensor]) -> None:
    once, twice = {}, {}
    for times, gradients in ((1, once), (2, twice)):
        leaf, weights = drawn()
        loss = method(leaf * 1, weights).square().sum()
        for count in reversed(range(times)):
            loss.backward(retain_graph=count > 0)
        gradients |= {"rows": leaf.grad, "weights": weights.grad}
    for name, gradient in once.items():
        assert torch.equal(2 * gradient, twice[name])


def test_whoever_else_needs_overwritten_vectors_is_told(method: Callable[..., torch.Tensor]) -> None:
    leaf, weights = drawn()
    looked_up = leaf * 1
    other = looked_up.square().sum() * 0
    projected = method(looked_up, weights).square().sum()
    projected.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_two_w2_cannot_be_applied_to_the_same_vectors_unnoticed(method: Callable[..., torch.Tensor]) -> None:
    leaf, weights = drawn()
    looked_up = leaf * 1
    both = method(looked_up, weights) + method(looked_up, 2 * weights)
    with pytest.raises(RuntimeError, match="vectors to which a W2 was applied have been modified"):
        both.sum().backward()
    method(leaf.detach(), weights).sum().backward()  # nothing overwrites vectors that need no gradient
    (method(leaf, weights) + method(leaf, 2 * weights)).sum().backward()  # nor a leaf


def test_vectors_are_freed_by_backward_though_somebody_holds_the_loss(method: Callable[..., torch.Tensor]) -> None:
    leaf, weights = drawn()
    looked_up = leaf * 1
    projected = method(looked_up, weights)
    (saved,) = [each for each in vars(_function_of(projected)).values() if isinstance(each, _SavedVectors)]
    loss = projected.square().sum()
    del looked_up, projected
    loss.backward()
    assert saved._vectors is None


def _function_of(found: torch.Tensor) -> Any:
    """Return the autograd function with the vectors."""
    pending = [found.grad_fn]
    while pending:
        node = pending.pop()
        if "Projected" in type(node).__name__:
            return node
        pending += [each for each, _ in node.next_functions if each is not None]
    raise AssertionError("no product with W2")


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_no_gradient_is_computed_for_what_is_frozen(method: Callable[..., torch.Tensor], frozen: str) -> None:
    expected: dict[str, torch.Tensor | None] = {}
    for freeze in (False, True):
        leaf, weights = drawn()
        if freeze:
            (leaf if frozen == "rows" else weights).requires_grad_(False)
        method(leaf, weights).square().sum().backward()
        found = {"rows": leaf.grad, "weights": weights.grad}
        if freeze:
            assert found.pop(frozen) is None
            assert all(torch.equal(found[name], expected[name]) for name in found)
        expected = found


def test_nothing_is_saved_where_nothing_is_differentiated(method: Callable[..., torch.Tensor]) -> None:
    leaf, weights = drawn()
    expected = method(leaf, weights)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(method(leaf * 1, weights), expected)
    with torch.inference_mode():
        made = leaf * 1
    found = method(made, weights)  # W2 is differentiated, with vectors that have no version
    (gradient,) = torch.autograd.grad(found.sum(), weights)
    (of_leaf,) = torch.autograd.grad(expected.sum(), weights)
    assert torch.equal(gradient, of_leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    tables=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["4x8", "4x2", "4", "6x3", "6"])), min_size=1, max_size=6
    ),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_rows_of_tables_of_several_widths_against_float64(
    dtype: torch.dtype, tables: list[tuple[int, str]], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    tables = sorted(tables, key=lambda each: each[1][0])
    counts = [count for count, _ in tables]
    dims = [int(shape[0]) for _, shape in tables]
    widths = [int(shape.split("x")[-1]) for _, shape in tables]
    weights = [
        torch.randn(width, dim, generator=draw).requires_grad_() if "x" in shape else None
        for (_, shape), width, dim in zip(tables, widths, dims, strict=True)
    ]
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    leaf = torch.randn(sum(sizes), generator=draw).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    exact_weights = [None if each is None else each.detach().double().requires_grad_() for each in weights]
    expected: dict[int, list[torch.Tensor]] = {}
    for part, weight, width, dim in zip(exact.split(sizes), exact_weights, widths, dims, strict=True):
        block = part.view(-1, width)
        expected.setdefault(dim, []).append(block if weight is None else block @ weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = project_tables(leaf * 1, counts, widths, dims, weights)
    allowed = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    assert all(each.dtype == torch.float32 for each in found)
    for each, of_dim in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(each.double(), torch.cat(of_dim), **allowed)
    upstream = [torch.randn(each.shape, generator=draw) for each in found]
    torch.autograd.backward(found, upstream)
    torch.autograd.backward([torch.cat(each) for each in expected.values()], [each.double() for each in upstream])
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, **allowed)
    for weight, exact_weight in zip(weights, exact_weights, strict=True):
        if weight is not None and exact_weight is not None:
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **allowed)


def test_a_compiler_sees_plain_products() -> None:
    leaf, weights = drawn()
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        found = of_block(leaf, weights)
    assert "Projected" not in type(found.grad_fn).__name__
    torch.testing.assert_close(found, of_block(leaf, weights))


def test_a_single_part_is_not_copied_and_several_have_the_gradient_of_slices() -> None:
    values = torch.arange(6.0, requires_grad=True)
    (whole,) = split_flat(values, [6])
    assert whole is values  # a slice of all values would copy their gradient
    one, none, three = split_flat(values * 1, [2, 0, 4])
    (2 * one.sum() + none.sum() + (three * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2, 1, 2, 3, 4]
