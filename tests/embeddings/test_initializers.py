import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.embeddings.initializers import RowInitializer

ROWS, DIM, BLOCK = 2 * 8192 + 700, 3, 8192


def initializer(**changes: Any) -> RowInitializer:
    settings_ = {"name": "table", "num_rows": ROWS, "distribution": "normal", "scale": 0.5, "seed": 7} | changes
    return RowInitializer(**settings_)


def drawn(dim: int = DIM, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.Tensor:
    fill = initializer(**changes)
    weight = torch.full((fill.num_rows, dim), math.nan, dtype=dtype)
    fill(weight)
    return weight


WHOLE = {distribution: drawn(distribution=distribution) for distribution in ("normal", "uniform")}
# Any row, and often one next to the boundary of a block.
row = st.integers(0, ROWS) | st.sampled_from(
    [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, ROWS - 1, ROWS]
)


@given(first=row, last=row, distribution=st.sampled_from(["normal", "uniform"]))
@settings(max_examples=80, deadline=None)
def test_a_shard_has_the_rows_of_the_full_weight(first: int, last: int, distribution: str) -> None:
    first, last = min(first, last), max(first, last)
    shard = torch.full((last - first, DIM), math.nan)
    initializer(distribution=distribution).fill(shard, first_row=first)
    assert torch.equal(shard, WHOLE[distribution][first:last])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_shards_of_any_number_of_ranks_make_up_the_full_weight(world_size: int) -> None:
    share = -(-ROWS // world_size)
    shards = []
    for first in range(0, ROWS, share):
        shards.append(torch.empty(min(share, ROWS - first), DIM))
        initializer().fill(shards[-1], first)
    assert torch.equal(torch.cat(shards), WHOLE["normal"])


def test_rows_do_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = drawn()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(again, WHOLE["normal"])
    assert torch.equal(drawn(), WHOLE["normal"])


@pytest.mark.parametrize("change", [{"name": "tablf"}, {"seed": 8}])
def test_other_names_and_seeds_draw_other_values(change: dict[str, Any]) -> None:
    other = drawn(**change)
    assert not (other == WHOLE["normal"]).any(dim=1).any()
    pairs = torch.stack([other.flatten(), WHOLE["normal"].flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.02


def test_blocks_and_rows_differ_from_one_another() -> None:
    full = WHOLE["normal"]
    assert full.unique(dim=0).shape[0] == ROWS
    assert not torch.equal(full[:700], full[BLOCK : BLOCK + 700])


@pytest.mark.parametrize(("scale", "center"), [(0.5, 0.0), (2.0, 0.0), (0.25, 3.0)])
def test_normal_has_the_given_mean_and_deviation(scale: float, center: float) -> None:
    values = drawn(scale=scale, center=center).double()
    standard_error = scale / math.sqrt(values.numel())
    assert float(values.mean()) == pytest.approx(center, abs=5 * standard_error)
    assert float(values.std()) == pytest.approx(scale, rel=0.02)
    inside = ((values - center).abs() < scale).double().mean()
    assert float(inside) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.015)


@pytest.mark.parametrize(("scale", "center"), [(0.5, 0.0), (0.01, 0.0), (0.5, 2.0)])
def test_uniform_fills_its_range_and_stays_inside(scale: float, center: float) -> None:
    values = drawn(distribution="uniform", scale=scale, center=center).double()
    rounding = 1e-6 * (scale + abs(center))
    assert float(values.min()) >= center - scale - rounding
    assert float(values.max()) <= center + scale + rounding
    assert float(values.min()) < center - 0.999 * scale
    assert float(values.max()) > center + 0.999 * scale
    assert float(values.mean()) == pytest.approx(center, abs=5 * scale / math.sqrt(3 * values.numel()))
    assert float(values.std()) == pytest.approx(scale / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_hold_the_same_values_rounded(dtype: torch.dtype) -> None:
    assert torch.equal(drawn(dtype=dtype), WHOLE["normal"].to(dtype))


@pytest.mark.parametrize(("first_row", "rows"), [(-1, 2), (ROWS - 1, 2), (ROWS, 1), (ROWS + 1, 0), (0, ROWS + 1)])
def test_a_shard_outside_the_weight_is_refused(first_row: int, rows: int) -> None:
    shard = torch.zeros(rows, DIM)
    with pytest.raises(ValueError, match=rf"^table: rows {first_row}\.\.{first_row + rows} do not lie .* 0\.\.{ROWS}$"):
        initializer().fill(shard, first_row)
    assert not shard.any()


def test_a_parameter_is_filled_without_a_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(ROWS, DIM))
    initializer()(parameter)
    assert torch.equal(parameter.data, WHOLE["normal"])
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_filling_a_view_does_not_change_the_rest() -> None:
    buffer = torch.zeros(30, DIM)
    initializer().fill(buffer[10:20], first_row=BLOCK - 5)
    assert torch.equal(buffer[10:20], WHOLE["normal"][BLOCK - 5 : BLOCK + 5])
    assert not buffer[:10].any()
    assert not buffer[20:].any()


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_the_first_row_may_be_zero_and_leaves_the_others_as_they_are(distribution: str) -> None:
    weight = drawn(distribution=distribution, zero_first_row=True)
    assert weight[0].eq(0).all()
    assert torch.equal(weight[1:], WHOLE[distribution][1:])


def test_only_the_shard_with_row_0_has_the_zero_row() -> None:
    shards = [torch.full((100, DIM), math.nan) for _ in range(2)]
    for number, shard in enumerate(shards):
        initializer(zero_first_row=True).fill(shard, first_row=100 * number)
    assert shards[0][0].eq(0).all()
    assert torch.equal(torch.cat(shards)[1:], WHOLE["normal"][1:200])
    empty = torch.empty(0, DIM)
    initializer(zero_first_row=True).fill(empty, first_row=0)
