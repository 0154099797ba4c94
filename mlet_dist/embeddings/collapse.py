"""The product W = W1·W2 of a trained table, computed in blocks of rows to bound temporary memory."""

import torch

_BLOCK_BYTES = 1 << 21  # of float32; a block stays in a core's cache
_MIN_ROWS = 64


def block_rows(hidden_dim: int, embedding_dim: int) -> int:
    """Return the number of rows multiplied at a time, a power of two.

    It depends on k and d only, because splitting a matrix product elsewhere may change the last bit of its result.
    """
    rows = _BLOCK_BYTES // (4 * max(hidden_dim, embedding_dim))
    return max(_MIN_ROWS, 1 << max(0, rows.bit_length() - 1))


@torch.no_grad()
def collapse_rows(rows: torch.Tensor, projection: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return W = W1·W2 (MLET paper, section 2), computed in blocks of ``block_rows`` rows.

    On the same device with the same number of threads, a part of W1 that begins at a multiple of ``block_rows`` gives
    rows that are bitwise identical to those of the full product.

    Args:
        rows: W1 ``(n, k)``; it is multiplied in float32.
        projection: W2 ``(k, d)``.
        out: tensor ``(n, d)`` to write to; by default a new float32 tensor.
    """
    hidden_dim, embedding_dim = projection.shape
    table = torch.empty(rows.shape[0], embedding_dim, device=rows.device) if out is None else out
    step, projection = block_rows(hidden_dim, embedding_dim), projection.float()
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        torch.mm(rows[block].float(), projection, out=table[block])
    return table
