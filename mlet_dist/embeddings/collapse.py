"""W = W1·W2, without ever holding more than a block of it twice."""

import torch

BLOCK_ROWS = 1 << 16


@torch.no_grad()
def collapse_rows(rows: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Multiply by blocks of rows (MLET paper, section 2): W1 ``(n, k)`` and W2 ``(k, d)`` -> W ``(n, d)`` float32."""
    table = torch.empty(rows.shape[0], projection.shape[1], device=rows.device)
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        torch.mm(rows[block].float(), projection.float(), out=table[block])
    return table
