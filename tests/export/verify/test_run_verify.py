"""`mlet verify` and `mlet evaluate` agree with the metrics of training, and report damage."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mlet_dist.errors import UserError
from mlet_dist.export.run_evaluate import evaluate_path
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.models.spec import TABLES_PREFIX
from mlet_dist.quality.score_metrics import auc, logloss
from mlet_dist.quality.scores_file import read_scores
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.tampered_export import change_manifest, change_tensor


@pytest.mark.e2e
def test_verify_passes_for_all_models_of_an_export(trained: TrainedRun, exported: Path) -> None:
    result = mlet_json(
        "verify", exported, "--run", trained.path, "--data", trained.data, "--auc-tolerance", "int4=0.01"
    )
    assert result["ok"] is True
    assert result["rows"] == 601
    assert result["auc_run"] == pytest.approx(trained.result["test_auc"], abs=1e-6)
    assert result["logloss_run"] == pytest.approx(trained.result["test_logloss"], abs=1e-6)
    outputs = result["outputs"]
    assert list(outputs) == ["dcp", "safetensors", "fp16", "int8", "int4", "package/model.pt", "package/model.pt2"]
    relative = {name: max(t["relative_error"] for t in found["tables"].values()) for name, found in outputs.items()}
    for name in ("dcp", "safetensors"):
        assert outputs[name]["max_abs_logit_diff"] < 1e-5
        assert outputs[name]["auc"] == pytest.approx(result["auc_run"], abs=1e-6)
        assert relative[name] < 1e-6
    assert 1e-5 < relative["fp16"] < 1e-3 < relative["int8"] < 0.02 < relative["int4"] < 0.3
    assert 0 < outputs["fp16"]["max_abs_logit_diff"] < outputs["int8"]["max_abs_logit_diff"]
    assert outputs["int8"]["max_abs_logit_diff"] < outputs["int4"]["max_abs_logit_diff"]
    for name in ("package/model.pt", "package/model.pt2"):
        assert outputs[name]["encoding"] == "int8"
        assert outputs[name]["auc"] == pytest.approx(outputs["int8"]["auc"], abs=1e-4)
        assert outputs[name]["logloss"] == pytest.approx(outputs["int8"]["logloss"], abs=1e-6)


@pytest.mark.e2e
def test_the_scores_of_each_output_are_those_that_were_compared(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    command = ("verify", exported, "--run", trained.path, "--data", trained.data, "--auc-tolerance", "int4=0.01")
    command = (*command, "--scores", tmp_path / "scores")
    result = mlet_json(*command)
    files = {path.stem: path for path in (tmp_path / "scores").iterdir()}
    assert files.keys() == {name.replace("/", "-") for name in result["outputs"]}
    for name, output in result["outputs"].items():
        scores = read_scores(files[name.replace("/", "-")])
        assert len(scores) == result["rows"]
        assert logloss(scores) == pytest.approx(output["logloss"], abs=1e-6)
        assert auc(scores) == pytest.approx(output["auc"], abs=1e-3)  # of bins
    assert error_line(*command).endswith("scores: is not empty; name another directory for the scores, or remove it")


def test_evaluate_returns_the_metrics_of_training(trained: TrainedRun, exported: Path) -> None:
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
    # Replicated rows are stored in float32 whatever rows_dtype is.
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


def _table(name: str) -> str:
    return f"{TABLES_PREFIX}embedding_bags.{name}.weight"


@pytest.mark.e2e
def test_a_row_that_differs_fails_and_is_named(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    ids = pq.read_table(trained.data / "test")["C3"].to_pylist()
    row = next(i for i, each in enumerate(ids) if ids.count(each) == 1)
    export = shutil.copytree(exported, tmp_path / "export")
    change_tensor(export, "dcp", _table("C3"), lambda table: table[ids[row]].add_(1.0))
    result = mlet_json("verify", export, "--run", trained.path, "--data", trained.data, expect=1)
    assert result["ok"] is False
    assert {name for name, found in result["outputs"].items() if not found["ok"]} == {"dcp"}
    found = result["outputs"]["dcp"]
    assert found["worst_row"] == row
    assert found["max_abs_logit_diff"] > 1e-3
    assert found["tables"]["C3"]["worst_row"] == ids[row]
    assert found["tables"]["C3"]["max_abs_error"] == pytest.approx(1.0, abs=1e-4)
    assert found["tables"]["C4"]["max_abs_error"] < 1e-6


def test_a_row_that_differs_fails_even_if_the_split_does_not_look_it_up(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    seen = set(pq.read_table(trained.data / "test")["C3"].to_pylist())
    row = next(each for each in range(300) if each not in seen)
    export = shutil.copytree(exported, tmp_path / "export")
    change_tensor(export, "dcp", _table("C3"), lambda table: table[row].add_(1.0))
    found = verify_export(export, trained.path, trained.data)["outputs"]["dcp"]
    assert found["max_abs_logit_diff"] < 1e-5
    assert found["tables"]["C3"]["worst_row"] == row
    assert found["ok"] is False


def test_quantised_tables_fail_by_their_auc(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    export = shutil.copytree(exported, tmp_path / "export")
    # Permute the rows.
    change_tensor(export, "int8", _table("C1"), lambda table: table.copy_(table.flip(0).clone()))
    result = verify_export(export, trained.path, trained.data)
    found = result["outputs"]["int8"]
    assert result["ok"] is found["ok"] is False
    assert abs(found["auc_change"]) > 5e-4
    assert found["tables"]["C1"]["relative_error"] > 0.1
    # The package was made from the original tables.
    assert result["outputs"]["package/model.pt"]["max_abs_probability_diff"] < 0.05


@pytest.mark.e2e
def test_tolerances_are_settings(trained: TrainedRun, exported: Path) -> None:
    arguments = ("verify", exported, "--run", trained.path, "--data", trained.data)
    shown = mlet(*arguments, "--auc-tolerance", "int4=0", "int8=1", expect=1).stdout.splitlines()
    assert [line.split()[0] for line in shown if line.endswith("FAILED")] == ["int4"]
    assert shown[0] == "601 rows of test"
    assert len(shown) == 3 + 7
    line = error_line(*arguments, "--auc-tolerance", "int5=1")
    assert "'int5=1' is not one of fp16, int8, int4 and a change of the AUC from 0 to 1" in line
    for tolerance in ("nan", "-1", "inf", "much"):
        assert f"{tolerance!r} is not a number of at least 0" in error_line(*arguments, f"--tolerance={tolerance}")


@pytest.mark.parametrize(
    "file", ["model/C3-*", "fp16/.metadata", "safetensors/C3-*", "int8/_dense*", "package/model.pt2"]
)
def test_a_flipped_bit_is_named(trained: TrainedRun, exported: Path, tmp_path: Path, file: str) -> None:
    export = shutil.copytree(exported, tmp_path / "export")
    path = next(export.glob(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}.* is damaged: the block at byte 0 has checksum"):
        verify_export(export, trained.path, trained.data)
    if path.parent.name == "model":
        with pytest.raises(UserError, match=f"{path.name} is damaged: the block at byte 0 has checksum"):
            evaluate_path(export, trained.data, "test")


def test_verify_warns_of_an_export_from_another_checkpoint(
    trained: TrainedRun, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = shutil.copytree(exported, tmp_path / "export")
    verify_export(export, trained.path, trained.data)
    assert "warning" not in capsys.readouterr().err
    change_manifest(export, lambda manifest: manifest["run"].update(checkpoint_sha256="0" * 64))
    verify_export(export, trained.path, trained.data)
    assert f"mlet: warning: {export} was made from another checkpoint than step-" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["dcp", "fp16"])
def test_a_table_of_nan_does_not_pass(trained: TrainedRun, exported: Path, tmp_path: Path, output: str) -> None:
    export = shutil.copytree(exported, tmp_path / "export")
    # In float16, NaN has all bits set.
    change_tensor(export, output, _table("C9"), lambda table: table.fill_(torch.nan if output == "dcp" else 255))
    found = verify_export(export, trained.path, trained.data)["outputs"][output]
    assert found["ok"] is False
    assert found["max_abs_logit_diff"] == float("inf")
    assert found["tables"]["C9"]["max_abs_error"] == float("inf")


def test_directories_of_the_wrong_kind_are_named(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an export"):
        verify_export(trained.path, trained.path, trained.data)
    with pytest.raises(UserError, match="not a run"):
        verify_export(exported, exported, trained.data)
    with pytest.raises(UserError, match="not a prepared data set"):
        verify_export(exported, trained.path, exported)
    with pytest.raises(UserError, match="no such directory"):
        verify_export(tmp_path / "nothing", trained.path, trained.data)


@pytest.mark.parametrize(
    "changed", [{"outputs": 5}, {"outputs": {"dcp": {"directory": "model"}}}, {"outputs": {"dcp": {"encoding": "x"}}}]
)
def test_a_manifest_with_incomplete_outputs_is_rejected(
    trained: TrainedRun, exported: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    export = tmp_path / "export"
    export.mkdir()
    shutil.copy(exported / "manifest.json", export)
    change_manifest(export, lambda manifest: manifest.update(changed))
    with pytest.raises(UserError, match="export again"):
        verify_export(export, trained.path, trained.data)


@pytest.mark.parametrize(
    ("key", "value"),
    [("embedding_dim", 8), ("top_mlp", [4]), ("pooling", "mean"), ("name", "deepfm"), ("arguments", {"towers": 2})],
)
def test_another_model_is_rejected(
    trained: TrainedRun, exported: Path, tmp_path: Path, key: str, value: object
) -> None:
    export = tmp_path / "export"
    export.mkdir()
    shutil.copy(exported / "manifest.json", export)
    change_manifest(export, lambda manifest: manifest["model"]["model"].update({key: value}))
    with pytest.raises(UserError, match="its inputs, its network or the sizes of its tables are not those of"):
        verify_export(export, trained.path, trained.data)


def test_data_of_another_vocabulary_are_rejected(trained: TrainedRun, exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mlet("synth", "--out", other, "--rows", 6001, "--num-embeddings", 300, "--seed", 5)
    with pytest.raises(UserError, match="the ids of sparse feature C1 belong to another vocabulary"):
        verify_export(exported, trained.path, other)
