"""Rows of a table on disk that are read by their numbers, wherever they are, are those that were saved."""

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.checkpoint.tensor_ranges import DcpFiles
from mlet_dist.errors import UserError
from mlet_dist.models.spec import TABLES_PREFIX
from mlet_dist.stored_tables import table_source
from mlet_dist.stored_tables.table_source import TableSource, open_table

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROWS, D = 500, 3
NAME = f"{TABLES_PREFIX}embedding_bags.t.weight"


@pytest.fixture
def table(tmp_path: Path) -> TableSource:
    path = tmp_path / "step-00000001"
    state = {NAME: torch.arange(ROWS * D, dtype=torch.float32).view(ROWS, D), "sum": torch.arange(ROWS).float()}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    found = Checkpoint.at(str(path))
    assert found is not None
    return open_table("t", (ROWS, D), None, DcpFiles(path, found.open), "", f"{TABLES_PREFIX}embedding_bags.t.weight")


@pytest.mark.parametrize("most_rows", [1, 7, 1 << 16])
def test_rows_are_read_in_any_order_and_a_bounded_number_at_once(
    most_rows: int, table: TableSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_source, "_MOST_ROWS", most_rows)
    largest = 0
    read_rows = DcpFiles.read_rows

    def counted(files: DcpFiles, name: str, start: int, out: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, len(out))
        read_rows(files, name, start, out)

    monkeypatch.setattr(DcpFiles, "read_rows", counted)
    rows = torch.tensor([499, 0, 1, 6, 7, 8, 80, 140, 141, 300, 6])
    values = table.read_located(NAME, rows)
    torch.testing.assert_close(values, rows.unsqueeze(1) * D + torch.arange(D).float(), rtol=0, atol=0)
    torch.testing.assert_close(table.read_located("sum", rows), rows.float(), rtol=0, atol=0)
    assert largest <= most_rows
    assert table.read_located(NAME, rows[:0]).shape == (0, D)


def test_a_tensor_that_is_not_there_is_named(table: TableSource) -> None:
    with pytest.raises(UserError, match="holds no tensor 'exp_avg'"):
        table.read_located("exp_avg", torch.tensor([0]))
