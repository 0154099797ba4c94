import pytest
import torch

from mlet_dist.embeddings.collapse import block_rows, collapse_rows


@pytest.mark.parametrize("rows_at_a_time", [7, 40, 41, 1])
def test_every_block_is_the_product_within_float32_rounding(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlet_dist.embeddings.collapse.block_rows", lambda *_: rows_at_a_time)
    generator = torch.Generator().manual_seed(0)
    rows, projection = torch.randn(40, 12, generator=generator), torch.randn(12, 5, generator=generator)
    error = (collapse_rows(rows, projection).double() - rows.double() @ projection.double()).abs()
    # The classical bound on a float32 sum of k products, in any order.
    bound = 12 * 2.0**-23 * (rows.double().abs() @ projection.double().abs())
    assert bool((error <= bound).all())


@pytest.mark.parametrize(
    ("hidden_dim", "embedding_dim", "dtype"),
    [
        (4, 4, torch.float32),
        (12, 4, torch.float32),
        (64, 16, torch.float16),
        (128, 16, torch.float32),
        (132, 36, torch.float32),
        (512, 4, torch.float32),
        (512, 64, torch.float32),
    ],
)
def test_parts_that_begin_at_blocks_are_bitwise_identical_to_the_full_product(
    hidden_dim: int, embedding_dim: int, dtype: torch.dtype
) -> None:
    step = block_rows(hidden_dim, embedding_dim)
    assert step & (step - 1) == 0
    generator = torch.Generator().manual_seed(hidden_dim)
    # One row beyond a block, and as many rows that a matrix kernel has a remainder.
    for count in (1, step + 1, 2 * step + 77):
        rows = torch.randn(count, hidden_dim, generator=generator).to(dtype)
        projection = torch.randn(hidden_dim, embedding_dim, generator=generator)
        full = collapse_rows(rows, projection)
        for start in range(0, count, step):
            part = rows[start : start + step].clone()
            assert torch.equal(collapse_rows(part, projection), full[start : start + step])
        out = torch.empty(count, embedding_dim)
        assert collapse_rows(rows, projection, out=out) is out
        assert torch.equal(out, full)


def test_half_precision_rows_are_multiplied_in_float32() -> None:
    rows = torch.randn(3, 4).half()
    projection = torch.eye(4)
    found = collapse_rows(rows, projection)
    assert found.dtype == torch.float32
    assert torch.equal(found, rows.float())
