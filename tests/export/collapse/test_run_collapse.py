"""An export contains W1·W2 under the names of a plain TorchRec model, and incomplete runs are rejected."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from mlet_dist.errors import UserError
from mlet_dist.export.collapse.run_collapse import export_run
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.conftest import TrainedRun
from tests.helpers.checkpoint_manifest import write_manifest
from tests.helpers.export_units import contents
from tests.helpers.mlet_command import error_line
from tests.helpers.resealed import reseal_json
from tests.helpers.rows_by_id import model_by_id


def _all_tensors(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Load a full checkpoint by PyTorch's own conversion, which shares no code with mlet_dist."""
    dcp_to_torch_save(checkpoint, scratch)
    tensors: dict[str, torch.Tensor] = torch.load(scratch, weights_only=False)
    return tensors


def test_tables_equal_the_float64_product_and_dense_layers_are_bitwise_identical(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    run = _all_tensors(trained.path / "checkpoints" / "step-00000057", tmp_path / "run.pt")["model"]
    served = _all_tensors(exported / "model", tmp_path / "export.pt")
    spec, manifest = ExportDirectory(exported).load()
    run = model_by_id(run, ModelSpec.load(trained.path / "model.json"))
    assert set(served) == set(build_serving_model(spec).state_dict())
    tables = 0
    for name, tensor in served.items():
        if name.startswith(TABLES_PREFIX):
            table = name.split(".")[-2]
            expected = run[name].double() @ run[f"{TABLES_PREFIX}projections.{table}.weight"].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            tables += 1
        else:
            assert torch.equal(tensor, run[name])
    assert tables == len(manifest["tables"]) == 26
    described = {entry["state_name"]: entry for entry in [*manifest["tables"], *manifest["dense"]]}
    assert {name: list(tensor.shape) for name, tensor in served.items()} == {
        name: entry["shape"] for name, entry in described.items()
    }


def test_two_exports_are_bitwise_identical(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    export_run(trained.path, tmp_path / "again")
    assert contents(tmp_path / "again" / "model") == contents(exported / "model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "never finished"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "never finished"),
        (lambda run: (run / "config.yaml").unlink(), "not a run"),
        (lambda run: (run / "model.json").write_text("{"), "model.json"),
        (lambda run: next(run.glob("checkpoints/*/*.distcp")).unlink(), "distcp is missing"),
        (lambda run: os.truncate(max(run.glob("checkpoints/*/*.distcp")), 100), "distcp has 100 bytes instead of"),
        (lambda run: os.truncate(next(run.glob("checkpoints/*/.metadata")), 10), r"\.metadata has 10 bytes instead of"),
    ],
)
def test_an_incomplete_run_is_rejected_and_leaves_no_files(
    trained: TrainedRun, tmp_path: Path, damage: object, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    assert callable(damage)
    damage(run)
    with pytest.raises(UserError, match=message) as raised:
        export_run(run, tmp_path / "out" / "export")
    assert str(run) in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.e2e
def test_a_missing_run_is_reported_in_one_line(tmp_path: Path) -> None:
    assert "no such directory" in error_line("export", tmp_path / "nothing", "--out", tmp_path / "export", "--nproc", 2)
    assert not (tmp_path / "export").exists()


def test_a_model_of_other_shapes_than_the_checkpoint_is_rejected(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    for change in ({"hidden_dim": None}, {"hidden_dim": 16}, {"top_mlp": [8]}):
        shutil.copy(trained.path / "model.json", run / "model.json")
        changed = dict(change)
        reseal_json(run / "model.json", lambda model: model | {"model": model["model"] | changed})  # noqa: B023
        with pytest.raises(UserError, match=r"step-00000057: .*in the model"):
            export_run(run, tmp_path / "export")
        assert not (tmp_path / "export").exists()


@pytest.mark.e2e
def test_layers_that_do_not_fit_each_other_name_the_table(trained: TrainedRun, tmp_path: Path) -> None:
    run = shutil.copytree(trained.path, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000057"
    dcp_to_torch_save(checkpoint, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    name = next(name for name in state["model"] if ".projections." in name)
    state["model"][name] = state["model"][name][:8]
    torch.save(state, tmp_path / "state.pt")
    shutil.rmtree(checkpoint)
    torch_save_to_dcp(tmp_path / "state.pt", checkpoint)
    write_manifest(checkpoint)
    line = error_line("export", run, "--out", tmp_path / "export")
    table = name.split(".")[-2]
    assert line == f"mlet: error: {checkpoint}: table {table!r}: W1 has 12 columns and W2 has 8 rows"
    assert not (tmp_path / "export").exists()
