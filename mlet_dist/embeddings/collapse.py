"""W = W1·W2, without ever holding more than a block of it twice."""

import torch

_BLOCK_BYTES = 1 << 21  # of W1 in float32: a block stays in a core's cache
_LEAST_ROWS = 64


def block_rows(hidden_dim: int, embedding_dim: int) -> int:
    """Rows that are multiplied at a time, a power of two.

    It depends on the table alone: a matrix product's last bit may be another one where the matrix is cut elsewhere.
    """
    rows = _BLOCK_BYTES // (4 * max(hidden_dim, embedding_dim))
    return max(_LEAST_ROWS, 1 << max(0, rows.bit_length() - 1))


@torch.no_grad()
def collapse_rows(rows: torch.Tensor, projection: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by blocks of rows (MLET paper, section 2): W1 ``(n, k)`` and W2 ``(k, d)`` -> W ``(n, d)`` float32.

    On one device and with one number of threads, parts of W1 that begin at multiples of ``block_rows`` give the bits
    that all of it gives at once.

    Args:
        out: where W goes; by default, into a new tensor.
    """
    hidden_dim, embedding_dim = projection.shape
    table = torch.empty(rows.shape[0], embedding_dim, device=rows.device) if out is None else out
    step, projection = block_rows(hidden_dim, embedding_dim), projection.float()
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        torch.mm(rows[block].float(), projection, out=table[block])
    return table
