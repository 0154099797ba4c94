"""Exports of runs whose rows are stored in the order of ``row_order`` hold the same bytes as those of rows by id."""

from pathlib import Path

import pytest
import torch

from benchmarks.made_run import make_run, random_rows
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.errors import UserError
from tests.helpers.export_units import contents, export

TABLES = {"one": 1, "long": 30_003}
MODEL = ModelConfig(embedding_dim=8, hidden_dim=16, bottom_mlp=(16,), top_mlp=(16,))
OUTPUTS = ("dcp", "int8")


def _by_id(name: str, start: int, count: int, columns: int) -> torch.Tensor:
    return random_rows(name, 0, TABLES.get(name, 16), columns)[start : start + count]


def _stored(name: str, start: int, count: int, columns: int) -> torch.Tensor:
    whole = _by_id(name, 0, TABLES.get(name, 16), columns)
    if name in TABLES:
        whole = RowOrder((TABLES[name],)).to_stored(whole)
    return whole[start : start + count].clone()


@pytest.mark.parametrize("shards", [1, 5])
def test_the_files_are_those_of_rows_by_id(shards: int, tmp_path: Path) -> None:
    make_run(tmp_path / "by-id", TABLES, MODEL, shards=2, rows=_by_id)
    make_run(tmp_path / "spread", TABLES, MODEL, shards=shards, rows=_stored, spread=True)
    for name in ("by-id", "spread"):
        export(tmp_path / name, tmp_path / f"export-{name}", outputs=OUTPUTS)
    for part in ("model", "int8"):
        assert contents(tmp_path / "export-by-id" / part) == contents(tmp_path / "export-spread" / part)


def test_a_flipped_bit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("manifest", "checked_file"):
        monkeypatch.setattr(f"mlet_dist.checkpoint.{module}.BLOCK_BYTES", 1 << 16)
    run = tmp_path / "run"
    make_run(run, TABLES, MODEL, shards=3, rows=_stored, spread=True)
    (shard,) = run.glob("checkpoints/*/__2_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"__2_0\.distcp is damaged: the block at byte"):
        export(run, tmp_path / "out", outputs=OUTPUTS)
    assert not (tmp_path / "out").exists()
