"""Read a table in blocks of rows in float64, and compute its Gram matrices."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mlet_dist.errors import UserError
from mlet_dist.progress import Progress
from mlet_dist.stored_tables.table_source import TableSource

BLOCK_BYTES = 1 << 25
"""Bytes of a block in float64. A pass over a table takes memory for about four blocks."""


@dataclass(frozen=True)
class Grams:
    """Gram matrices of a table, float64.

    Attributes:
        table: WᵀW (d, d).
        rows: W1ᵀW1 (k, k); None for a single layer.
        weighted: WᵀDW (d, d), where the diagonal of D counts how often each row occurs; None without counts.
    """

    table: torch.Tensor
    rows: torch.Tensor | None
    weighted: torch.Tensor | None


def block_rows(table: TableSource) -> int:
    """Return the number of rows of ``table`` in a block."""
    return max(1, BLOCK_BYTES // (8 * max(table.hidden_dim or 0, table.embedding_dim)))


def read_blocks(table: TableSource) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the values of each block of W1, or of W for a single layer, in float64.

    Raises:
        UserError: a file is missing or damaged, or a value is not finite; the message names table and row.
    """
    step = block_rows(table)
    for start in range(0, table.num_embeddings, step):
        block = table.read_stored(start, min(start + step, table.num_embeddings)).double()
        if not block.sum().isfinite():
            wrong = (~block.isfinite()).any(dim=1).nonzero()
            if len(wrong):
                raise UserError(
                    f"{table.location}: table {table.name!r}: row {start + int(wrong[0]):,} holds a value that is not "
                    "finite"
                )
        yield start, block


def sum_grams(table: TableSource, counts: npt.NDArray[np.int64] | None, progress: Progress) -> Grams:
    """Compute the Gram matrices of a table in one pass over its rows.

    Args:
        counts: (n,), how often each row occurs in the data; None if unknown.

    Raises:
        UserError: as for ``read_blocks``.
    """
    k, d = table.hidden_dim, table.embedding_dim
    projection = None if table.projection is None else table.projection.double()
    of_table = torch.zeros(d, d, dtype=torch.float64)
    of_rows = None if k is None else torch.zeros(k, k, dtype=torch.float64)
    weighted = None if counts is None else torch.zeros(d, d, dtype=torch.float64)
    for start, block in read_blocks(table):
        if of_rows is not None and projection is not None:
            of_rows.addmm_(block.T, block)
            block = block @ projection
        of_table.addmm_(block.T, block)
        if weighted is not None and counts is not None:
            weights = torch.from_numpy(counts[start : start + len(block)]).double()
            weighted.addmm_(block.T, block * weights[:, None])
        progress.update(len(block), table=table.name)
    return Grams(of_table, of_rows, weighted)
