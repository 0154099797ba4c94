"""The rows of a table that are stored: their numbers, and the table of these rows alone."""

from dataclasses import dataclass

import pytest
import torch

from mlet_dist.export import kept_rows
from mlet_dist.export.kept_rows import KeptRows, KeptTableSource
from mlet_dist.stored_tables.table_source import TableSource


@dataclass(frozen=True)
class _Masked(TableSource):
    """A table in memory, of which only some rows are stored."""

    values: torch.Tensor
    mask: torch.Tensor

    def stored_rows(self, start: int, stop: int) -> torch.Tensor | None:
        mask = self.mask[start:stop]
        return None if bool(mask.all()) else mask

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        rows.copy_(self.values[start : start + len(rows)])


def _table(mask: torch.Tensor) -> _Masked:
    values = torch.arange(1.0, 3 * len(mask) + 1).view(-1, 3) * mask[:, None]
    return _Masked("t", "t.weight", len(mask), None, 3, None, torch.float32, "", None, values, mask)  # type: ignore


MASKS = {
    "all": torch.ones(50, dtype=torch.bool),
    "first": torch.arange(50) < 21,
    "last": torch.arange(50) > 20,
    "gap": (torch.arange(50) < 10) | (torch.arange(50) > 30),
    "every third": torch.arange(50) % 3 == 1,
    "random": torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.5,
    "one": torch.arange(50) == 33,
    "first of each block": torch.arange(50) % 8 == 0,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_kept_rows_keep_their_order_and_others_read_zero(mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rows, "_BLOCK_ROWS", 8)
    table, count = _table(mask), int(mask.sum())
    kept = KeptRows.of(table)
    assert (kept.num_embeddings, kept.count, kept.rows) == (50, count, min(50, count + 1))
    assert (kept.ids is None) == bool(mask[:count].all())
    numbers = kept.renumber(torch.arange(50))
    assert torch.equal(numbers[mask], torch.arange(count))
    assert bool((numbers[~mask] == count).all())
    assert [kept.id_of(number) for number in range(count)] == mask.nonzero()[:, 0].tolist()
    if count < 50:
        assert kept.id_of(count) == int((~mask).nonzero()[0])
    compact = KeptTableSource.of(table, kept)
    assert torch.equal(compact.read_stored(0, kept.rows)[numbers], table.values)
    for size in (1, 7):
        parts = [compact.read_stored(start, min(start + size, kept.rows)) for start in range(0, kept.rows, size)]
        assert torch.equal(torch.cat(parts)[numbers], table.values)


@dataclass(frozen=True)
class _Shared(_Masked):
    """A table whose rows after the first 21 read the last of these."""

    @property
    def shared_row(self) -> int:
        return 20


def test_rows_that_share_one_read_it_behind_the_others() -> None:
    mask = torch.arange(50) < 21
    table = _table(mask)
    values = table.values.clone()
    values[21:] = values[20]
    shared = _Shared("t", "t.weight", 50, None, 3, None, torch.float32, "", None, values, mask)  # type: ignore[arg-type]
    kept = KeptRows.of(shared)
    assert (kept.count, kept.rows, kept.ids) == (20, 21, None)
    compact = KeptTableSource.of(shared, kept)
    assert torch.equal(compact.read_stored(0, 21)[kept.renumber(torch.arange(50))], values)
    assert torch.equal(compact.read_stored(18, 21), values[18:21])
