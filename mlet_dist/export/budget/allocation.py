"""Widths of ranges of rows within a number of bytes, by how much the loss of a model depends on them.

The rows of a table come in the order of their ids, the frequent ones first, and are cut into blocks that grow with the
id. A block with the Gram matrix G of its looked-up vectors, each as often as the split looks it up, costs

    tr(M · R_w · G · R_w) / 2      R_w = I − P_wᵀ·P_w

of LogLoss if its rows have w columns: M is the curvature of the loss (``SplitModel.curvatures``), and P_w are the w
directions in which the vectors of the table are longest. Rows of no columns read their mean. For a price λ of a byte,
each table gets the widths that cost least, which never grow with the id; λ is the lowest with which they fit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.export.encoding import Encoding
from mlet_dist.stored_tables.refitted_source import vectors_of_ids
from mlet_dist.stored_tables.table_source import TableSource

_GROWTH = 1.5  # of a block over the one before it
_HALVINGS = 50  # of the interval of log λ
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
_READ_ROWS = 1 << 16

Ranges = dict[str, tuple[RowRange, ...]]


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a table.

    Attributes:
        start, stop: their ids.
        gram: Σ c·v·vᵀ ``(d, d)`` float64 of their vectors v, looked up c times for each row of the training split.
        total: Σ c·v ``(d,)``.
        lookups: Σ c.
    """

    start: int
    stop: int
    gram: torch.Tensor
    total: torch.Tensor
    lookups: float


def blocks_of(table: TableSource, counts: torch.Tensor, rows_of_split: int) -> list[Block]:
    """Return the blocks of a table, read once.

    Args:
        table: the table.
        counts: how often the training split looks up each row ``(n,)`` float64.
        rows_of_split: of the training split.

    Raises:
        UserError: a file is missing or damaged.
    """
    edges = [0]
    while edges[-1] < table.num_embeddings:
        edges.append(min(table.num_embeddings, max(edges[-1] + 8, math.ceil(edges[-1] * _GROWTH))))
    found = []
    for start, stop in pairwise(edges):
        gram = torch.zeros(table.embedding_dim, table.embedding_dim, dtype=torch.float64)
        total = torch.zeros(table.embedding_dim, dtype=torch.float64)
        for first in range(start, stop, _READ_ROWS):
            last = min(first + _READ_ROWS, stop)
            vectors = vectors_of_ids(table, first, last)
            weighted = vectors * (counts[first:last] / rows_of_split)[:, None]
            gram.addmm_(vectors.T, weighted)
            total += weighted.sum(dim=0)
        found.append(Block(start, stop, gram, total, float(counts[start:stop].sum()) / rows_of_split))
    return found


def widths_of(embedding_dim: int) -> tuple[int, ...]:
    """Return the widths that ranges of rows may have besides 0, descending."""
    return tuple(w for w in (round(embedding_dim * share) for share in _SHARES) if w >= 4 and w % 4 == 0)


def costs_of(blocks: list[Block], curvature: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """Return what each width, and then none, costs of the LogLoss: ``(blocks, len(widths) + 1)`` float64."""
    _, directions = torch.linalg.eigh(sum((block.gram for block in blocks), torch.zeros_like(curvature)))
    identity = torch.eye(len(curvature), dtype=torch.float64)
    costs = torch.zeros(len(blocks), len(widths) + 1, dtype=torch.float64)
    for column, width in enumerate(widths):
        kept = directions.flip(1)[:, :width]
        rest = identity - kept @ kept.T
        for row, block in enumerate(blocks):
            costs[row, column] = (curvature * (rest @ block.gram @ rest)).sum() / 2
    for row, block in enumerate(blocks):
        around_mean = block.gram - torch.outer(block.total, block.total) / max(block.lookups, 1e-300)
        costs[row, -1] = (curvature * around_mean).sum() / 2
    return costs.clamp(min=0)


@dataclass(frozen=True)
class PricedTable:
    """A table whose widths are to be chosen.

    Attributes:
        blocks: of its rows.
        widths: that these may have, descending.
        costs: of ``costs_of``.
    """

    blocks: list[Block]
    widths: tuple[int, ...]
    costs: torch.Tensor

    def ranges(self, price: float, encoding: Encoding, only: Sequence[int] | None = None) -> tuple[RowRange, ...]:
        """Return the widths that cost least, bytes at a ``price`` in LogLoss; ``only`` some of the widths."""
        widths = [width for width in self.widths if only is None or width in only]
        row_bytes = [*(encoding.row_bytes(width) if encoding.fits(width) else math.inf for width in widths), 0]
        chosen = [self.widths.index(width) for width in widths] + [len(self.widths)]
        costs = self.costs[:, chosen]
        sizes = torch.tensor([block.stop - block.start for block in self.blocks], dtype=torch.float64)
        priced = costs + price * sizes[:, None] * torch.tensor(row_bytes, dtype=torch.float64)
        best = _least_of_descending(priced)
        last = len(widths)
        rows = [0] * (last + 1)
        for block, column in zip(self.blocks, best, strict=True):
            rows[column] += block.stop - block.start
        if rows[last]:  # ids behind the kept rows read one of them, the last
            narrowest = max((column for column in range(last) if rows[column]), default=0)
            rows[narrowest] += 1
            rows[last] -= 1
        return tuple(RowRange(number, width) for number, width in zip(rows, (*widths, 0), strict=True) if number)


def _least_of_descending(costs: torch.Tensor) -> list[int]:
    """Return a column for each row of ``(blocks, columns)`` that never falls, with the least sum of costs."""
    reached, taken = costs[0].clone(), []
    for row in costs[1:]:
        least, column = reached.cummin(dim=0)
        taken.append(column)
        reached = least + row
    best = [int(reached.argmin())]
    for column in reversed(taken):
        best.append(int(column[best[-1]]))
    return best[::-1]


def allocate(
    tables: Mapping[str, PricedTable],
    encoding: Encoding,
    budget: int,
    size_of: Callable[[Ranges], int],
    only: Mapping[str, Sequence[int]] | None = None,
) -> Ranges | None:
    """Return the ranges of all tables within a budget; None if not even one row of each table fits.

    Args:
        tables: by name.
        encoding: of the rows.
        budget: bytes.
        size_of: the bytes that ranges take as they are served.
        only: by table, the widths to choose from; None for all.
    """

    def at(log_price: float) -> Ranges:
        price = math.exp(log_price)
        return {
            name: table.ranges(price, encoding, None if only is None else only[name]) for name, table in tables.items()
        }

    low, high = -60.0, 10.0
    if size_of(at(high)) > budget:
        return None
    if size_of(at(low)) <= budget:
        return at(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if size_of(at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return at(high)
