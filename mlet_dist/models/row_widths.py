"""Static compression: the width of every row, chosen before training from how often training looks it up.

A row with c lookups gets the largest of the permitted widths that is at most s·c^alpha, or none (mixed dimensions,
arXiv:1909.11810, with the temperature alpha). The scale s is the largest with which the tables stay within the budget:
rows, W2 and the optimizer's state of both together. Of rows with as many lookups, the first ones of their tables come
first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlet_dist.config.sections import CompressionConfig, ModelConfig
from mlet_dist.embeddings.planning.cost_model import FLOAT, Optimizer, replicated_bytes, row_state_bytes
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError

Counts = npt.NDArray[np.int64]

_HALVINGS = 60  # of the interval of log s
_TIE = 0.5  # the largest difference that the order of rows makes; counts differ by 1 at least


@dataclass(frozen=True)
class Sizes:
    """The bytes that a row and a W2 take in training, with their optimizer state.

    Attributes:
        embedding_dim: d.
        optimizer: the optimizer of the rows. W2 has the same one, but adagrad if the rows have rowwise_adagrad.
        bytes_per_row: what every row takes besides, whatever its width.
    """

    embedding_dim: int
    optimizer: Optimizer
    bytes_per_row: int = 0

    def row(self, width: int) -> int:
        """Return the bytes of a row of W1; 0 for width 0."""
        return FLOAT * width + row_state_bytes(self.optimizer, width) if width else 0

    def projection(self, width: int) -> int:
        """Return the bytes of W2, without its gradient; 0 for rows of width d, which have none."""
        if width in (0, self.embedding_dim):
            return 0
        elements = width * self.embedding_dim
        return replicated_bytes(elements, self.optimizer) - FLOAT * elements

    def table(self, ranges: Sequence[RowRange]) -> int:
        """Return the bytes of a table with row ranges."""
        rows = sum(each.rows for each in ranges)
        return rows * self.bytes_per_row + sum(
            each.rows * self.row(each.width) + self.projection(each.width) for each in ranges
        )


def default_widths(model: ModelConfig) -> tuple[int, ...]:
    """Return hidden_dim and its halves above embedding_dim, embedding_dim, and half of it, if kernels support it."""
    d, found = model.embedding_dim, []
    width = model.hidden_dim or d
    while width > d and width % 4 == 0:
        found.append(width)
        width //= 2
    return (*found, d, *([d // 2] if d % 8 == 0 else []))


def static_ranges(
    counts: Mapping[str, Counts], compression: CompressionConfig, model: ModelConfig, sizes: Sizes
) -> dict[str, tuple[RowRange, ...]]:
    """Return the row ranges of each table.

    Args:
        counts: lookups of each row by table, sorted in descending order but for row 0, which stands for values out of
            vocabulary and is treated as the row after it.
        compression: budget, widths and alpha.
        model: for the default widths.
        sizes: of rows and W2.

    Raises:
        UserError: the counts of a table are not sorted, or the budget is too small to store any row.
    """
    widths = sorted(compression.widths or default_widths(model))
    ordered = {name: _descending(name, each) for name, each in counts.items()}
    single = sum(len(each) * sizes.row(sizes.embedding_dim) for each in counts.values())
    budget = compression.budget * single

    def at(log_scale: float) -> dict[str, tuple[RowRange, ...]]:
        least = [(width / math.exp(log_scale)) ** (1 / compression.alpha) for width in widths]
        return {name: _ranges(each, widths, least, sizes) for name, each in ordered.items()}

    def size(ranges: Mapping[str, Sequence[RowRange]]) -> int:
        return sum(sizes.table(each) for each in ranges.values())

    top = max(float(each[0]) for each in ordered.values())
    # With the lowest scale no row has any columns, with the highest all rows have the largest width.
    low = math.log(widths[0]) - compression.alpha * math.log(max(top, 1.0)) - 1
    high = math.log(widths[-1]) + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    found = at(low)
    if size(found) > budget:
        raise UserError(
            f"compression.budget {compression.budget:g} is {budget:,.0f} bytes, in which one row of each table cannot "
            f"be stored; it must be at least {size(found) / single:.1e} of the {single:,} bytes of single-layer tables"
        )
    return found


def _descending(name: str, counts: Counts) -> npt.NDArray[np.float64]:
    """Return the counts with that of row 0 replaced by the largest, and the first of equal ones made larger.

    Raises:
        UserError: the counts are far from sorted.
    """
    known = counts.copy()
    known[0] = known[1] if len(known) > 1 else max(known[0], 1)
    sorted_counts = np.sort(known)[::-1]
    cut = max(1, len(known) // 4)
    if known[:cut].sum() < 0.5 * sorted_counts[:cut].sum():
        raise UserError(
            f"compression.policy is static, but the ids of table {name!r} are not sorted by descending frequency: the "
            f"first quarter of its rows has {known[:cut].sum():,} lookups, and the most frequent quarter "
            f"{sorted_counts[:cut].sum():,}; use a vocabulary of the features that the model takes, or policy none"
        )
    envelope = np.maximum.accumulate(known[::-1])[::-1]
    return envelope + np.linspace(_TIE, 0, len(known), endpoint=False)


def _ranges(
    counts: npt.NDArray[np.float64], widths: Sequence[int], least: Sequence[float], sizes: Sizes
) -> tuple[RowRange, ...]:
    """Return the ranges of a table, widest first, of rows with at least ``least`` lookups for each of ``widths``.

    Rows that are too few for a width pass to a neighbouring one: wide rows are no more than W2 has rows, so that they
    take no more than the next narrower width; narrow ones save less than their W2 takes, and get d columns.
    """
    ascending = counts[::-1]
    upper = [len(counts) - int(np.searchsorted(ascending, each, side="left")) for each in least]
    d = sizes.embedding_dim
    rows = {width: upper[i] - (upper[i + 1] if i + 1 < len(widths) else 0) for i, width in enumerate(widths)}
    for i in reversed(range(1, len(widths))):
        width, next_narrower = widths[i], widths[i - 1]
        if width > d and 0 < rows[width] < width:
            rows[next_narrower] += rows.pop(width)
            rows[width] = 0
    for width in widths:
        saved = rows[width] * (sizes.row(d) - sizes.row(width)) if width < d else 0
        if width < d and d in rows and 0 < rows[width] and saved <= sizes.projection(width):
            rows[d] += rows[width]
            rows[width] = 0
    found, start, total = [], 0, max(1.0, float(counts.sum()))
    if not any(rows.values()):
        rows[d] = 1  # every table stores its first row at least
    for width in sorted(rows, reverse=True):
        if rows[width]:
            share = float(counts[start : start + rows[width]].sum()) / total
            found.append(RowRange(rows[width], width, share))
            start += rows[width]
    if start < len(counts):
        found.append(RowRange(len(counts) - start, 0, float(counts[start:].sum()) / total))
    return tuple(found)


def describe_ranges(ranges: Mapping[str, Sequence[RowRange]], counts: Mapping[str, Counts]) -> str:
    """Return the share of all rows and of all lookups of each width, in one line."""
    rows: dict[int, int] = {}
    lookups: dict[int, float] = {}
    for name, of_table in ranges.items():
        total = float(counts[name].sum())
        for each in of_table:
            rows[each.width] = rows.get(each.width, 0) + each.rows
            lookups[each.width] = lookups.get(each.width, 0.0) + each.share * total
    all_rows, all_lookups = sum(rows.values()), max(1.0, sum(lookups.values()))
    return ", ".join(
        f"{rows[width] / all_rows:.1%} of the rows with {width} columns ({lookups[width] / all_lookups:.1%} of lookups)"
        for width in sorted(rows, reverse=True)
    )
