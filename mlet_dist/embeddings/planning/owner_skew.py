"""How unequally the owners of rows work, expected from how often the data set looks up each row.

Row i of a table is looked up with probability p_i, its share of the lookups. A batch of m ids has it with probability
1 - (1 - p_i)^m, so the sum of these over an owner's rows is the number of distinct rows that a rank asks it for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
_Values = npt.NDArray[np.float64]

BlockSums = Callable[[_Values, int], _Values]
"""Adds up a value of each row over the blocks that ranks own: values ``(n,)`` and R -> ``(R,)``."""

_CHUNK = 1 << 22  # rows at once, since a table may have hundreds of millions


@dataclass(frozen=True)
class ExpectedLookups:
    """What batches are expected to look up in one table.

    Attributes:
        distinct_ids: distinct rows of one rank's batch.
        distinct_of_all: distinct rows of all ranks' batches together.
        shares: ``(R,)`` float64, the share of ``distinct_ids`` in each block of rows.
    """

    distinct_ids: float
    distinct_of_all: float
    shares: _Values


def expected_lookups(counts: Counts, ids: float, world_size: int, sums: BlockSums | None = None) -> ExpectedLookups:
    """Return what batches are expected to look up in a table.

    Args:
        counts: ``(n,)`` lookups of each row in the training split.
        ids: ids of the table in one rank's batch.
        world_size: R.
        sums: how rows are divided into blocks; by default into contiguous ones.
    """
    own = _probabilities(counts, ids)
    blocks = (sums or sums_of_blocks)(own, world_size)
    distinct = float(blocks.sum())
    shares = blocks / distinct if distinct else np.full(world_size, 1 / world_size)
    return ExpectedLookups(distinct, float(_probabilities(counts, ids * world_size).sum()), shares)


def sums_of_blocks(values: _Values, world_size: int) -> _Values:
    """Add up values over contiguous blocks of ``ceil(n / R)`` rows."""
    block = -(-len(values) // world_size)
    return np.array([values[first * block : (first + 1) * block].sum() for first in range(world_size)])


def busiest_owner(
    lookups: Mapping[str, ExpectedLookups], seconds: Mapping[str, float], ranks: Mapping[str, Sequence[int]]
) -> float:
    """Return the work of the busiest owner over the mean of all owners; 1 without tables.

    Args:
        lookups: of each table that is divided among all ranks.
        seconds: the work of an average owner of each table.
        ranks: the rank of each block of each table.
    """
    if not lookups:
        return 1.0
    loads = np.zeros(len(next(iter(lookups.values())).shares))
    for name, own in lookups.items():
        np.add.at(loads, np.asarray(ranks[name]), seconds[name] * own.shares)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _probabilities(counts: Counts, ids: float) -> _Values:
    """Return the probability that a batch of ``ids`` ids has each row."""
    total, found = max(1, int(counts.sum())), np.empty(len(counts))
    for first in range(0, len(counts), _CHUNK):
        share = np.minimum(counts[first : first + _CHUNK] / total, 1 - 1e-12)
        found[first : first + _CHUNK] = -np.expm1(ids * np.log1p(-share))
    return found
