"""`mlet verify` and `mlet evaluate`: they agree with training, and they notice damage."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed import checkpoint as dcp

from mlet_dist.errors import UserError
from mlet_dist.export.manifest import describe_tensor
from mlet_dist.export.verify import verify_export
from mlet_dist.models.dlrm import TABLES_PREFIX
from tests.command import ROOT, mlet, mlet_json
from tests.conftest import TrainedRun


@pytest.mark.e2e
def test_verify_finds_the_run_and_its_export_equal(trained: TrainedRun, exported: Path) -> None:
    result = mlet_json("verify", exported, "--run", trained.path, "--data", trained.data)
    assert result["ok"] is True
    assert result["rows"] == 601
    assert result["max_abs_logit_diff"] < 1e-5
    assert result["auc_run"] == pytest.approx(trained.result["test_auc"], abs=1e-6)
    assert result["auc_export"] == pytest.approx(trained.result["test_auc"], abs=1e-6)


@pytest.mark.e2e
def test_evaluate_gives_what_training_gave(trained: TrainedRun, exported: Path) -> None:
    for target, ranks in ((trained.path, ["--nproc", "2"]), (exported, [])):
        found = mlet_json("evaluate", target, "--data", trained.data, "--split", "test", *ranks)
        assert found["rows"] == 601
        assert found["auc"] == pytest.approx(trained.result["test_auc"], abs=1e-6)
        assert found["logloss"] == pytest.approx(trained.result["test_logloss"], abs=1e-6)
        valid = mlet_json("evaluate", target, "--data", trained.data, "--split", "valid")
        assert valid["auc"] == pytest.approx(trained.result["valid_auc"], abs=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize("hidden_dim", ["12", "null"])
def test_a_run_in_half_precision_is_exported_and_verified(trained: TrainedRun, tmp_path: Path, hidden_dim: str) -> None:
    run, out = tmp_path / "run", tmp_path / "export"
    half = ("sharding.rows_dtype=fp16", "sharding.forward_comm=fp16", "sharding.backward_comm=bf16")
    # Replicated rows are stored in float32 whatever is asked.
    half += ("sharding.tables.C1.sharding_types=[data_parallel]",)
    overrides = (*trained.overrides, *half, f"model.hidden_dim={hidden_dim}", f"run.dir={run}")
    result = mlet_json("train", ROOT / "configs" / "criteo_kaggle.yaml", *overrides, "--nproc", 2)
    if hidden_dim == "12":
        assert result["test_logloss"] == pytest.approx(trained.result["test_logloss"], abs=5e-3)
        assert result["trained_table_bytes"] < 0.6 * trained.result["trained_table_bytes"]
        assert result["served_table_bytes"] == trained.result["served_table_bytes"]
    assert mlet_json("export", run, "--out", out)["trained_bytes"] == result["trained_table_bytes"]
    assert {table["dtype"] for table in json.loads((out / "manifest.json").read_text())["tables"]} == {"float32"}
    assert mlet_json("verify", out, "--run", run, "--data", trained.data)["ok"] is True
    for target, ranks in ((run, ["--nproc", "2"]), (out, [])):
        found = mlet_json("evaluate", target, "--data", trained.data, *ranks)
        assert found["logloss"] == pytest.approx(result["test_logloss"], abs=1e-4)


def _tamper(export: Path, table: str, row: int, mend_manifest: bool) -> None:
    """Change one row of a served table, and its checksum with it where asked."""
    manifest = json.loads((export / "manifest.json").read_text())
    name = f"{TABLES_PREFIX}embedding_bags.{table}.weight"
    entries = [*manifest["tables"], *manifest["dense"]]
    state = {entry["state_name"]: torch.empty(entry["shape"]) for entry in entries}
    dcp.load(state, checkpoint_id=export / "model", no_dist=True)
    state[name][row] += 1.0
    shutil.rmtree(export / "model")
    dcp.save(state, checkpoint_id=export / "model", no_dist=True)
    if mend_manifest:
        for entry in entries:
            entry |= describe_tensor(entry["state_name"], state[entry["state_name"]])
        (export / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.e2e
def test_a_table_that_differs_in_one_row_fails_and_the_row_is_named(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    ids = pq.read_table(trained.data / "test")["C3"].to_pylist()
    row = next(i for i, each in enumerate(ids) if ids.count(each) == 1)
    export = tmp_path / "export"
    shutil.copytree(exported, export)
    _tamper(export, "C3", ids[row], mend_manifest=True)
    result = json.loads(
        mlet("verify", export, "--run", trained.path, "--data", trained.data, "--json", expect=1).stdout.splitlines()[
            -1
        ]
    )
    assert result["ok"] is False
    assert result["worst_row"] == row
    assert result["max_abs_logit_diff"] > 1e-3


def test_a_damaged_export_is_refused_by_its_checksum(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(exported, export)
    _tamper(export, "C3", 0, mend_manifest=False)
    with pytest.raises(UserError, match=r"C3\.weight has checksum"):
        verify_export(export, trained.path, trained.data)


def test_a_table_of_nan_does_not_pass(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(exported, export)
    _tamper(export, "C9", 0, mend_manifest=True)
    manifest = json.loads((export / "manifest.json").read_text())
    state = {entry["state_name"]: torch.empty(entry["shape"]) for entry in [*manifest["tables"], *manifest["dense"]]}
    dcp.load(state, checkpoint_id=export / "model", no_dist=True)
    name = f"{TABLES_PREFIX}embedding_bags.C9.weight"
    state[name][:] = torch.nan
    shutil.rmtree(export / "model")
    dcp.save(state, checkpoint_id=export / "model", no_dist=True)
    for entry in manifest["tables"]:
        entry |= describe_tensor(entry["state_name"], state[entry["state_name"]])
    (export / "manifest.json").write_text(json.dumps(manifest))
    result = verify_export(export, trained.path, trained.data)
    assert result["ok"] is False
    assert result["max_abs_logit_diff"] == float("inf")


def test_directories_of_the_wrong_kind_are_named(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an export"):
        verify_export(trained.path, trained.path, trained.data)
    with pytest.raises(UserError, match="not a run"):
        verify_export(exported, exported, trained.data)
    with pytest.raises(UserError, match="not a prepared data set"):
        verify_export(exported, trained.path, exported)
    with pytest.raises(UserError, match="no such directory"):
        verify_export(tmp_path / "nothing", trained.path, trained.data)


@pytest.mark.parametrize("emptied", [{"tables": [], "dense": []}, {"tables": 5}, {"dense": [{"state_name": "x"}]}])
def test_a_manifest_that_does_not_cover_the_model_is_refused(
    trained: TrainedRun, exported: Path, tmp_path: Path, emptied: dict[str, object]
) -> None:
    export = tmp_path / "export"
    shutil.copytree(exported, export)
    manifest = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps(manifest | emptied))
    with pytest.raises(UserError, match="export again"):
        verify_export(export, trained.path, trained.data)


def test_data_whose_ids_mean_something_else_is_refused(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mlet("synth", "--out", other, "--rows", 6001, "--num-embeddings", 300, "--seed", 5)
    with pytest.raises(UserError, match="its ids mean other values"):
        verify_export(exported, trained.path, other)
