"""The order in which the rows of a table are stored, so that any number of ranks owns equal shares of the lookups.

TorchRec gives each rank a block of consecutive stored rows. Ids are commonly sorted by descending frequency, so if row
i were stored at position i, the first rank would be asked for nearly everything. Here the rows are spread over 8,192
*lanes*, which are stored one after the other. Every lane has an equal share of the frequent rows, of the rare ones and
of all in between. A rank's block consists of lanes, so it has such a share as well.

Ids are cut into sections that double in size: [0, 8192), [8192, 16384), [16384, 32768), … A section is cut into 8,192
chunks of consecutive ids, and lane c has chunk c of every section, the first section first. Lanes are stored in the
order of their bit-reversed numbers, which spreads any consecutive lanes evenly, whatever the number of ranks.

The order depends on the number of rows alone, not on the number of ranks, so a checkpoint does not depend on it either.
Chunks grow with the sections, so consecutive ids of a large table are mostly stored in long runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

_LANE_BITS = 13
LANES = 1 << _LANE_BITS
"""The number of lanes: at least eight for each of 1,024 ranks."""

ROW_ORDER = "row_order"
"""The key of a checkpoint's manifest that names the order of rows; without it rows are stored by id."""

SPREAD = "spread"
"""The value of ``ROW_ORDER`` for the order of this module."""

_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class RowOrder:
    """The order in which the rows of one table are stored.

    A table may consist of parts, each with ids of its own that are sorted by frequency: the segments of a pool
    (``row_ranges``). Every lane has its share of every part. A *row* is counted from the first row of the first part,
    one part after the other; a *stored row* is a position in the weight.

    Args:
        sizes: the number of rows of each part.
    """

    sizes: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """The rows of the table."""
        return sum(self.sizes)

    @cached_property
    def first_stored(self) -> torch.Tensor:
        """The constants of ``stored_rows`` for each part ``(P, 2·LANES)`` int64, on the CPU."""
        of_lanes = self._stored_starts.view(LANES, -1).t()[:, _reversed_lanes()]
        return torch.cat([of_lanes - 1, of_lanes], dim=1)

    def stored_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stored rows of ``rows``, int64, of any shape and on any device."""
        first_stored = self.first_stored.to(rows.device)
        if len(self.sizes) == 1:
            return stored_rows(first_stored, rows, 0)
        first_rows = self._first_rows.to(rows.device)
        part = torch.searchsorted(first_rows, rows, right=True) - 1
        return stored_rows(first_stored, rows - first_rows[part], part)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows that are stored at ``[start, stop)``, ``(stop - start,)`` int64 on the CPU."""
        stored = torch.arange(start, stop, device="cpu")
        starts, parts = self._stored_starts, len(self.sizes)
        found = torch.searchsorted(starts, stored, right=True) - 1  # the last of equal starts is not empty
        height = stored - starts[found]
        lane = _reversed_lanes()[found.div(parts, rounding_mode="floor")]
        section = torch.frexp(height.double()).exponent  # 2^(section - 1) <= height < 2^section
        ids = torch.where(height == 0, lane, ((LANES - 1 + lane) << (section - 1).clamp_(min=0)) + height)
        return ids + self._first_rows[found % parts]

    def to_stored(self, values: torch.Tensor) -> torch.Tensor:
        """Return values ``(n, …)`` of all rows in the order in which they are stored."""
        return self._permuted(values, to_stored=True)

    def from_stored(self, values: torch.Tensor) -> torch.Tensor:
        """Return values ``(n, …)`` of all stored rows in the order of the rows."""
        return self._permuted(values, to_stored=False)

    def _permuted(self, values: torch.Tensor, *, to_stored: bool) -> torch.Tensor:
        if len(values) != self.num_rows:
            raise ValueError(f"{len(values):,} values for a table of {self.num_rows:,} rows")
        found = torch.empty_like(values)
        for start in range(0, self.num_rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, self.num_rows)
            source = self.rows(start, stop) if to_stored else self.stored_rows(torch.arange(start, stop, device="cpu"))
            found[start:stop] = values[source.to(values.device)]
        return found

    @cached_property
    def _first_rows(self) -> torch.Tensor:
        return torch.tensor([0, *accumulate(self.sizes[:-1])], device="cpu")

    @cached_property
    def _stored_starts(self) -> torch.Tensor:
        """The first stored rows of all parts of all lanes, ascending ``(LANES·P,)``: lane by lane, part by part."""
        counts = torch.stack([_rows_of_lanes(size) for size in self.sizes])
        ends = counts[:, _reversed_lanes()].t().reshape(-1).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends[:-1]])


def stored_rows(first_stored: torch.Tensor, ids: torch.Tensor, part: torch.Tensor | int) -> torch.Tensor:
    """Return the stored rows of ids, on the device of the ids and without waiting for it.

    Args:
        first_stored: ``RowOrder.first_stored`` of one or several tables, one below the other: ``(P, 2·LANES)``.
        ids: counted from the first row of their part, int64.
        part: the row of ``first_stored`` for each id, or for all of them.
    """
    # The exponent of the float64, which has no rounding below 2^53, is that of the largest power of two in the integer.
    exponent = (ids >> _LANE_BITS).double().view(torch.int64) >> 52
    shift = exponent.sub_(1023).clamp_(min=0)
    # Below 2·LANES ids are their own chunk, and each lane has two of them. Beyond, the chunk is the LANES-th or a later
    # multiple of 2^shift, and the lane has had as many rows before as the chunk has.
    chunk = ids >> shift
    firsts = first_stored.view(-1).index_select(0, (chunk + part * (2 * LANES)).view(-1)).view(ids.shape)
    return firsts.add_(ids).sub_(chunk.sub_(1) << shift)


def is_spread(about: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint stores rows in the order of this module, from the fields of its manifest.

    Raises:
        ValueError: it names another order.
    """
    found = about.get(ROW_ORDER)
    if found not in (None, SPREAD):
        raise ValueError(f"{ROW_ORDER} is {found!r}; this version of mlet_dist knows {SPREAD!r}")
    return found == SPREAD


def requests_of_owners(order: RowOrder | None, requests: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return how many rows are requested of each owner of a row-wise table, ``(ranks,)`` float64, block by block.

    Args:
        order: of the table; None for rows that are stored by id.
        requests: how often each row is requested, ``(n,)``, such as the probability that a batch has its id.
        ranks: R; each owns a block of ceil(n / R) stored rows.
    """
    block = -(-len(requests) // ranks)
    found = torch.zeros(ranks, dtype=torch.float64)
    for start in range(0, len(requests), _BLOCK_ROWS):
        rows = torch.arange(start, min(start + _BLOCK_ROWS, len(requests)), device="cpu")
        stored = rows if order is None else order.stored_rows(rows)
        found.index_add_(0, stored.div(block, rounding_mode="floor"), requests[rows].double())
    return found


def expected_requests(shares: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the probability that a rank's batch contains each id, and so requests it once: ``(n,)`` float64.

    Args:
        shares: the probability of each id in a draw ``(n,)``.
        batch_size: the ids that a rank draws.
    """
    return -torch.expm1(batch_size * torch.log1p(-shares.double()))


def busiest_over_mean(requests: Sequence[torch.Tensor]) -> float:
    """Return the requests of the busiest owner over their mean, for tables whose owners are in the order of ranks."""
    total = torch.stack(list(requests)).sum(dim=0)
    return float(total.max() / total.mean())


def _rows_of_lanes(size: int) -> torch.Tensor:
    """Return how many of ``size`` rows each lane has ``(LANES,)``."""
    lane = torch.arange(LANES, device="cpu")
    found = (size > lane).long()
    chunk, first = 1, LANES
    while first < size:
        found += (size - first - lane * chunk).clamp_(0, chunk)
        first, chunk = 2 * first, 2 * chunk
    return found


def _reversed_lanes() -> torch.Tensor:
    """Return the lanes in the order in which they are stored ``(LANES,)``, a permutation that is its own inverse."""
    lane = torch.arange(LANES, device="cpu")
    found = torch.zeros_like(lane)
    for bit in range(_LANE_BITS):
        found |= ((lane >> bit) & 1) << (_LANE_BITS - 1 - bit)
    return found
