"""Training on lists of ids, some of them weighted, as a user starts it."""

import json
from pathlib import Path

import pytest

from tests.helpers.mlet_command import ROOT, mlet_json

pytestmark = pytest.mark.e2e


def test_lists_and_shuffled_rows_train_the_same_model_on_one_and_two_ranks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lists = ["--multi-valued", "C3=6", "C9=0.5", "--weighted", "C3"]
    mlet_json("synth", "--out", data, "--rows", 3001, "--num-embeddings", 300, *lists)
    overrides = [
        f"data.path={data}",
        "data.batch_size=64",
        "data.shuffle=true",
        "data.shuffle_buffer=1000",
        "model.bottom_mlp=[16]",
        "model.top_mlp=[16]",
        "model.embedding_dim=4",
        "model.hidden_dim=12",
        "train.epochs=2",
        "optimizer.learning_rate=0.05",
    ]
    config = ROOT / "configs" / "criteo_kaggle.yaml"
    alone = mlet_json("train", config, *overrides, f"run.dir={tmp_path / 'alone'}")
    together = mlet_json("train", config, *overrides, f"run.dir={tmp_path / 'together'}", "--nproc", 2)
    assert alone["steps"] == together["steps"] == 2 * 38  # of 64 rows, and of the last 32
    assert alone["test_rows"] == 301
    for name in ("valid_logloss", "test_logloss"):
        assert alone[name] == pytest.approx(together[name], abs=2e-6)
    plan = {entry["table"]: entry for entry in json.loads((tmp_path / "together" / "plan.json").read_text())["tables"]}
    assert plan["C3"]["exchange"] == "reduce_scatter"  # by its pooling factor: of one id a bag it would be unique_rows
    assert plan["C12"]["exchange"] == "unique_rows"
