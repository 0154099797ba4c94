"""Initial values of the pools of adaptive tables (``slot_layout``)."""

import dataclasses
from dataclasses import dataclass

import torch

from mlet_dist.embeddings.initializers import RowInitializer
from mlet_dist.embeddings.slot_layout import SlotLayout

_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True)
class SlotInitializer:
    """A TorchRec ``init_fn`` of a pool of adaptive tables: a slot begins as a row of the table that has it first.

    Args:
        layout: of all pools.
        pool: the index of this one.
        initializers: of each table, with ``num_rows`` the slots of the pool, and all of the same name and seed.
        zero_rows: the numbers of rows that begin at zero.
    """

    layout: SlotLayout
    pool: int
    initializers: tuple[RowInitializer, ...]
    zero_rows: tuple[int, ...]

    def __call__(self, weight: torch.Tensor) -> None:
        """Fill the complete weight ``(slots, width)``."""
        self.fill(weight, first_row=0)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Fill a shard ``(slots, width)`` of whole buckets with slots [first_row, first_row + slots) of the pool."""
        size = self.layout.pools[self.pool].slots_per_bucket
        first_bucket, stop_bucket = first_row // size, (first_row + weight.shape[0]) // size
        step = max(1, _BLOCK_ROWS // max(size, self.layout.num_chunks * self.layout.rows_per_bucket))
        for start in range(first_bucket, stop_bucket, step):
            stop = min(start + step, stop_bucket)
            self._fill_buckets(weight[start * size - first_row : stop * size - first_row], start, stop)

    def _fill_buckets(self, weight: torch.Tensor, first_bucket: int, stop_bucket: int) -> None:
        first_row = first_bucket * self.layout.pools[self.pool].slots_per_bucket
        codes = self.layout.initial_slots(first_bucket, stop_bucket).long()
        first_code = int(self.layout.first_codes()[self.pool]) + first_row
        inside = (codes >= first_code) & (codes < first_code + weight.shape[0])
        rows = torch.full((weight.shape[0],), -1)
        rows[codes[inside] - first_code] = self.layout.rows_of(first_bucket, stop_bucket)[inside]
        tables = self.layout.parts_of(rows.clamp(min=0)) % len(self.layout.tables)
        unit = {each.distribution: dataclasses.replace(each, scale=1.0, center=0.0) for each in self.initializers}
        for distribution, initializer in unit.items():
            drawn = torch.empty(weight.shape)
            initializer.fill(drawn, first_row)
            own = torch.tensor([each.distribution == distribution for each in self.initializers])[tables]
            scales = torch.tensor([each.scale for each in self.initializers])[tables].unsqueeze(1)
            centers = torch.tensor([each.center for each in self.initializers])[tables].unsqueeze(1)
            weight[own.to(weight.device)] = (drawn * scales + centers)[own].to(weight)
        empty = (rows < 0) | torch.isin(
            rows % (self.layout.rows_per_bucket * self.layout.num_buckets),
            torch.tensor(self.zero_rows, dtype=torch.int64),
        )
        weight[empty.to(weight.device)] = 0
