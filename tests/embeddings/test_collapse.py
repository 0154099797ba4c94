import pytest
import torch

from mlet_dist.embeddings.collapse import collapse_rows


@pytest.mark.parametrize("block_rows", [7, 40, 41, 1])
def test_every_block_is_the_product_within_float32_rounding(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.embeddings.collapse.BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(0)
    rows, projection = torch.randn(40, 12, generator=generator), torch.randn(12, 5, generator=generator)
    error = (collapse_rows(rows, projection).double() - rows.double() @ projection.double()).abs()
    # The classical bound on a float32 sum of k products, in any order.
    bound = 12 * 2.0**-23 * (rows.double().abs() @ projection.double().abs())
    assert bool((error <= bound).all())


def test_half_precision_rows_are_multiplied_in_float32() -> None:
    rows = torch.randn(3, 4).half()
    projection = torch.eye(4)
    found = collapse_rows(rows, projection)
    assert found.dtype == torch.float32
    assert torch.equal(found, rows.float())
