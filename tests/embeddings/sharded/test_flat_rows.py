"""Rows of several widths in flat buffers, compared with loops."""

import pytest
import torch

from benchmarks.step_counters import count_step_operations
from mlet_dist.embeddings.sharded.flat_rows import FlatRows

CPU = torch.device("cpu")


@pytest.mark.parametrize("widths", [[4], [4, 8], [2, 6, 10]])
@pytest.mark.parametrize("number", [0, 1, 9])
def test_gathered_rows_are_those_of_a_loop_and_so_are_their_gradients(widths: list[int], number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    width_of_row = torch.randint(len(widths), (5,), generator=draw)
    flat = torch.randn(sum(widths[each] for each in width_of_row), generator=draw, requires_grad=True)
    rows = torch.randint(5, (number,), generator=draw)
    width_of_result = width_of_row[rows]
    parts = flat.split([widths[each] for each in width_of_row])
    expected = torch.cat([parts[row] for row in rows] or [flat[:0]])
    with count_step_operations() as counts:
        found = FlatRows(widths, CPU).gather(flat, width_of_row, rows, width_of_result, expected.numel())
    assert counts.synchronisation_calls == []
    assert torch.equal(found, expected)
    above = torch.randn(expected.shape, generator=draw)
    (gradient,) = torch.autograd.grad(found, flat, above)
    (of_loop,) = torch.autograd.grad(expected, flat, above)
    torch.testing.assert_close(gradient, of_loop)


def test_rows_are_split_by_width() -> None:
    first, second = FlatRows([2, 3], CPU).split(torch.arange(10.0), [2, 2])
    assert first.tolist() == [[0, 1], [2, 3]]
    assert second.tolist() == [[4, 5, 6], [7, 8, 9]]
