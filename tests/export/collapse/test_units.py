"""An export is bitwise identical for any number of ranks, any unit size and any amount of memory."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.made_run import make_run, random_rows
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.embeddings.collapse import block_rows, collapse_rows
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.run_collapse import ExportOptions, export_run
from mlet_dist.export.collapse.units import UnitWorker, read_rows, units_of, worker_bytes
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.outputs import OUTPUTS
from mlet_dist.export.source import ModelSource
from mlet_dist.models.spec import TABLES_PREFIX
from tests.conftest import TrainedRun
from tests.helpers.export_units import contents, export, export_in_rank
from tests.helpers.ranks import RankPool

ALL = ("dcp", "safetensors", "fp16", "int8", "int4")
TABLES = {"one": 1, "odd": 1_003, "even": 512}
MODEL = ModelConfig(embedding_dim=8, hidden_dim=36, bottom_mlp=(16,), top_mlp=(16,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the shards of three ranks, and a table with fewer rows than ranks."""
    path = tmp_path_factory.mktemp("made") / "run"
    make_run(path, TABLES, MODEL, shards=3)
    return path


def _tables(export_path: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(export_path / "model", scratch)
    found: dict[str, torch.Tensor] = torch.load(scratch)
    return {name: found[f"{TABLES_PREFIX}embedding_bags.{name}.weight"] for name in TABLES}


@pytest.mark.multirank
def test_any_number_of_ranks_writes_the_same_files(
    trained: TrainedRun, made: Path, ranks: Callable[..., RankPool], tmp_path: Path
) -> None:
    cases = ((trained.path, ("dcp", "safetensors"), False), (made, ALL, False), (made, ALL, True))
    for number, (run, outputs, gather) in enumerate(cases):
        single = export(run, tmp_path / f"{number}-1", outputs=outputs, gather=gather)
        expected = contents(tmp_path / f"{number}-1")
        assert "manifest.json" in expected
        for world_size in (2, 3):
            out = tmp_path / f"{number}-{world_size}"
            options = {"outputs": outputs, "gather": gather}
            results = ranks(world_size).run(export_in_rank, run, out, options)
            assert contents(out) == expected
            assert results[0] == single | {"out": str(out)}
    assert not list(tmp_path.glob(".*"))


def test_the_tables_equal_the_product_for_any_unit_size(made: Path, tmp_path: Path) -> None:
    result = export_run(made, tmp_path / "one")
    export(made, tmp_path / "units")
    export(made, tmp_path / "gathered", gather=True)
    assert result["bytes"] == sum(rows * 8 * 4 for rows in TABLES.values())
    files = sorted(path.name for path in (tmp_path / "units" / "model").glob("odd-*"))
    assert files == [f"odd-{index:05}-of-00008.distcp" for index in range(8)]
    assert (tmp_path / "one" / "model" / "odd-00000-of-00001.distcp").exists()
    assert (tmp_path / "gathered" / "model" / "odd.distcp").exists()
    found = {name: _tables(tmp_path / name, tmp_path / f"{name}.pt") for name in ("one", "units", "gathered")}
    for name, rows in TABLES.items():
        size = -(-rows // 3)
        bounds = [(start, min(size, rows - start)) for start in range(0, rows, size)]
        stored = torch.cat([random_rows(name, start, count, 36) for start, count in bounds])
        projection = random_rows(f"{name}.projection", 0, 36, 8)
        assert torch.equal(found["units"][name], found["gathered"][name])
        assert torch.equal(found["one"][name], collapse_rows(stored, projection))
        bound = 36 * 2.0**-23 * (stored.double().abs() @ projection.double().abs())
        for tables in found.values():
            assert bool(((tables[name].double() - stored.double() @ projection.double()).abs() <= bound).all())


def test_units_and_reads_begin_at_multiples_of_block_rows(made: Path) -> None:
    """The last bit of a product can depend on how a matrix is split, which a test of values need not show."""
    with ModelSource.of_run(made) as source:
        for rows, wide in itertools.product((1, 1_003, 10_000_000), (36, 128, 1_000)):
            table = dataclasses.replace(source.tables["odd"], num_embeddings=rows, hidden_dim=wide)
            block = block_rows(wide, table.embedding_dim)
            found = units_of([table])
            assert {unit.start % block for unit in found} == {0}
            assert read_rows(table) % block == 0
            assert [unit.stop for unit in found] == [*(unit.start for unit in found[1:]), rows]


def test_half_precision_and_single_layers_are_exported(tmp_path: Path) -> None:
    for hidden_dim in (24, None):
        run, out = tmp_path / f"run-{hidden_dim}", tmp_path / f"out-{hidden_dim}"
        model = ModelConfig(embedding_dim=12, hidden_dim=hidden_dim, bottom_mlp=(16,), top_mlp=(16,))
        make_run(run, TABLES, model, shards=1, rows_dtype=torch.float16)
        export(run, out)
        for name, table in _tables(out, tmp_path / f"{hidden_dim}.pt").items():
            rows = random_rows(name, 0, TABLES[name], hidden_dim or 12).half()
            if hidden_dim is None:
                assert torch.equal(table, rows.float())
            else:
                expected = rows.double() @ random_rows(f"{name}.projection", 0, hidden_dim, 12).double()
                torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)
            assert table.dtype == torch.float32


def test_finished_units_are_not_listed_after_every_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", {"long": 12_800}, MODEL, shards=1)
    finished, listings = WorkDirectory.finished, []
    monkeypatch.setattr(WorkDirectory, "finished", lambda self: (listings.append(1), finished(self))[1])
    export(tmp_path / "run", tmp_path / "out")
    assert len(list((tmp_path / "out" / "model").glob("long-*"))) == 100
    assert 2 <= len(listings) < 50


def test_a_checkpoint_may_be_at_a_url(made: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", TABLES, MODEL, shards=3, checkpoint_dir="memory://collapsed/checkpoints")
    assert not (tmp_path / "run" / "checkpoints").exists()
    export(tmp_path / "run", tmp_path / "remote")
    export(made, tmp_path / "local")
    assert contents(tmp_path / "remote" / "model") == contents(tmp_path / "local" / "model")


def test_memory_limits_the_number_of_concurrent_units(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_workers, begin = [], UnitWorker.__init__
    monkeypatch.setattr(UnitWorker, "__init__", lambda self, *args: (made_workers.append(1), begin(self, *args))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    source = ModelSource.of_run(made)
    least = worker_bytes(source.tables.values(), [OUTPUTS["dcp"]])
    source.files.close()
    export_run(made, tmp_path / "least", ExportOptions(memory=2 * least - 1))
    assert len(made_workers) == 1
    export_run(made, tmp_path / "much", ExportOptions(memory=100 * least))
    assert len(made_workers) == 1 + len(TABLES)  # each table has one unit
    assert contents(tmp_path / "least") == contents(tmp_path / "much")
    with pytest.raises(UserError, match=f"is too little for these tables; use {least:,} or more"):
        export_run(made, tmp_path / "less", ExportOptions(memory=least - 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["least", "much"]
