import json
from pathlib import Path

import pytest
import yaml

from mlet_dist.compare import comparison_table
from tests.command import ROOT, error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def test_three_arms_are_trained_exported_and_verified(small_model: tuple[str, ...], tmp_path: Path) -> None:
    base = tmp_path / "comparison"
    overrides = [*small_model, "train.max_steps=5", "optimizer.learning_rate=0.1", f"run.dir={base}"]
    result = mlet_json("compare", CONFIG, *overrides)
    assert result["ok"] is True
    assert list(result["arms"]) == ["single", "mlet", "control"]
    arms = result["arms"]
    # k = 12 and σ = 0.25: kσ² = 0.75, σ√k = 0.866.
    control = yaml.safe_load((base / "control.yaml").read_text())
    assert control["optimizer"]["rows_learning_rate"] == pytest.approx(0.1 * 0.75)
    assert control["model"]["rows_init_gain"] == pytest.approx(0.75**0.5)
    assert control["model"]["hidden_dim"] is None
    assert yaml.safe_load((base / "mlet.yaml").read_text())["model"]["hidden_dim"] == 12
    assert arms["single"]["trained_table_bytes"] == arms["control"]["trained_table_bytes"]
    assert arms["mlet"]["trained_table_bytes"] > 3 * arms["single"]["trained_table_bytes"]
    assert len({arm["served_table_bytes"] for arm in arms.values()}) == 1
    assert len({arm["weights_sha256"] for arm in arms.values()}) == 3
    assert all(arm["max_abs_logit_diff"] < 1e-5 for arm in arms.values())
    assert json.loads((base / "comparison.json").read_text()) == result

    table = (base / "comparison.md").read_text()
    assert table.strip() == comparison_table(result)
    assert f"{arms['mlet']['test_auc']:.4f}" in table
    # A second time it replaces what is there only when told to.
    assert "run.overwrite=true" in mlet("compare", CONFIG, *overrides, expect=2).stderr
    again = mlet("compare", CONFIG, *overrides, "run.overwrite=true").stdout
    assert again.startswith(table.strip())


def test_nothing_to_compare_without_a_hidden_dim(small_model: tuple[str, ...], tmp_path: Path) -> None:
    message = error_line("compare", CONFIG, *small_model, "model.hidden_dim=null", f"run.dir={tmp_path / 'run'}")
    assert "model.hidden_dim" in message
    assert not (tmp_path / "run").exists()


def test_an_undefined_auc_is_shown_as_such() -> None:
    arm = {
        "trained_table_bytes": 3_200_000_000,
        "served_table_bytes": 100_000,
        "test_auc": None,
        "test_logloss": 0.25,
        "max_abs_logit_diff": 0.0,
    }
    row = comparison_table({"arms": {"mlet": arm}}).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "MLET",
        "3.2 GB",
        "0.1 MB",
        "undefined",
        "0.2500",
        "none, bit for bit",
    ]
