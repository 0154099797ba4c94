"""Tests of training, evaluation, verification and comparison on data sets that lack a split."""

import json
from pathlib import Path

import pytest

from mlet_dist.data.schema import DatasetSchema
from tests.helpers.mlet_command import error_line, mlet, mlet_json
from tests.helpers.tables import PLAIN, prepare_table

pytestmark = pytest.mark.e2e


def make_data(folder: Path, shares: dict[str, float]) -> Path:
    lines = [f"{i * 7 % 5 % 2},v{i % 11}\n" for i in range(600)]
    (folder / "a.csv").write_text("y,x\n" + "".join(lines))
    prepare_table(folder / "data", PLAIN | {"split": {"by": "rows", "shares": shares}}, [folder / "a.csv"])
    return folder / "data"


def settings_of(data: Path, run: Path) -> list[str]:
    (run.parent / "c.yaml").write_text("model: {embedding_dim: 4, hidden_dim: 8, bottom_mlp: [8], top_mlp: [8]}\n")
    sizes = [f"data.path={data}", f"run.dir={run}", "data.batch_size=50"]
    return [str(run.parent / "c.yaml"), *sizes]


def test_a_data_set_without_test(tmp_path: Path) -> None:
    data, run, export = make_data(tmp_path, {"train": 0.75, "valid": 0.25}), tmp_path / "run", tmp_path / "export"
    summary = mlet_json("train", *settings_of(data, run))
    assert summary["valid_rows"] == 150
    assert "test_rows" not in summary
    mlet_json("export", run, "--out", export)
    message = f"mlet: error: {data}: has no test split; its splits are train and valid (see --split)"
    assert error_line("evaluate", run, "--data", data) == message
    assert error_line("verify", export, "--run", run, "--data", data) == message
    assert mlet_json("evaluate", export, "--data", data, "--split", "valid")["rows"] == 150
    assert mlet_json("verify", export, "--run", run, "--data", data, "--split", "valid")["ok"] is True


def test_a_data_set_of_training_rows_alone(tmp_path: Path) -> None:
    data = make_data(tmp_path, {"train": 1})
    assert set(DatasetSchema.load(data).rows) == {"train"}
    summary = mlet_json("train", *settings_of(data, tmp_path / "run"))
    assert not any(name.startswith(("valid_", "test_")) for name in summary)
    assert error_line("compare", *settings_of(data, tmp_path / "compared")) == (
        f"mlet: error: {data}: has neither a test nor a valid split, so that there is nothing to compare models on"
    )


@pytest.mark.parametrize(
    ("weights", "expected"), [("0", "all 60 rows have sample_weight 0"), ("1 - y", "above 0 have label 0")]
)
def test_a_split_that_weights_leave_without_a_class_is_said(tmp_path: Path, weights: str, expected: str) -> None:
    """Training learns nothing from such rows, and their AUC is undefined."""
    labels = [i * 7 % 5 % 2 for i in range(600)]
    lines = [f"{y},v{i % 11},{0 if weights == '0' else 1 - y}\n" for i, y in enumerate(labels)]
    (tmp_path / "a.csv").write_text("y,x,w\n" + "".join(lines))
    data, run = tmp_path / "data", tmp_path / "run"
    prepare_table(data, PLAIN | {"sample_weight": "w"}, [tmp_path / "a.csv"])
    trained = mlet("train", *settings_of(data, run), "--json")
    assert "warning: the rows that were trained on all have the same label, or a sample_weight of 0" in trained.stderr
    for split in ("valid", "test"):
        assert f"warning: {data}: {split}: all " in trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["test_auc"] is None
    assert expected in mlet("evaluate", run, "--data", data).stderr
