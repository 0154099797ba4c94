"""Training as a user starts it, on one and on several ranks, and its errors."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import TrainedRun
from tests.helpers.data_set_parts import replace_part
from tests.helpers.forked_command import MLET
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json, run_command, torchrun_mlet

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def test_a_run_leaves_config_metrics_checkpoint_and_summary(trained: TrainedRun) -> None:
    assert trained.result["run"] == str(trained.path)
    assert trained.result["steps"] == 57
    summary = json.loads((trained.path / "summary.json").read_text())
    assert summary.pop("seal").keys() == {"run", "sha256"}
    assert summary == trained.result
    assert (trained.path / "checkpoints" / "step-00000057" / ".metadata").exists()
    assert not list(trained.path.glob("**/.*.tmp"))
    assert list((trained.path / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["split"] != "timing"]
    assert [(record["split"], record["step"]) for record in records] == [
        ("train", 20),
        ("train", 40),
        ("train", 57),
        ("valid", 57),
        ("test", 57),
    ]
    assert all(0 < record["loss"] < 2 and 0 < record["auc"] < 1 for record in records[:3])
    assert records[2]["loss"] < records[0]["loss"]
    # 6,001 rows in order: 4,800 / 600 / 601, in batches of 250 that do not divide them.
    assert (records[3]["rows"], records[4]["rows"]) == (600, 601)
    assert trained.result["test_auc"] == records[4]["auc"]


def test_the_resolved_config_trains_the_same_model_again(trained: TrainedRun, tmp_path: Path) -> None:
    resolved = trained.path / "config.yaml"
    again = mlet_json("train", resolved, f"run.dir={tmp_path / 'again'}", "--nproc", 2)
    assert again["weights_sha256"] == trained.result["weights_sha256"]
    other_seed = mlet_json("train", resolved, f"run.dir={tmp_path / 'other'}", "train.seed=1", "--nproc", 2)
    assert other_seed["weights_sha256"] != trained.result["weights_sha256"]


def test_one_rank_and_torchrun_agree_with_two_ranks(trained: TrainedRun, tmp_path: Path) -> None:
    alone = mlet_json("train", CONFIG, *trained.overrides, f"run.dir={tmp_path / 'alone'}")
    assert alone["world_size"] == 1
    done = torchrun_mlet(2, "train", CONFIG, *trained.overrides, f"run.dir={tmp_path / 'torchrun'}", "--json")
    joined = json.loads(done.stdout.splitlines()[-1])
    assert joined["world_size"] == 2
    for other in (alone, joined):
        assert other["test_logloss"] == pytest.approx(trained.result["test_logloss"], abs=1e-4)
        assert other["test_auc"] == pytest.approx(trained.result["test_auc"], abs=2e-3)
        assert other["trained_table_bytes"] == trained.result["trained_table_bytes"]
        assert other["served_table_bytes"] == trained.result["served_table_bytes"]


@pytest.mark.parametrize(("given", "warned"), [("0", True), ("60", False)])
def test_checkpoints_that_take_longer_than_a_stop_gives_are_warned_of(
    small_model: tuple[str, ...], tmp_path: Path, given: str, warned: bool
) -> None:
    settings = (*small_model, "train.max_steps=4", "train.checkpoint_every=1", f"run.dir={tmp_path / 'run'}")
    command = [*MLET, "train", CONFIG, *settings]
    done = run_command(command, environment=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": given})
    lines = [line for line in done.stderr.splitlines() if "a stop would lose the steps since the last" in line]
    assert len(lines) == warned
    assert all(
        "s to write, and ranks that are told to stop have 0 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)" in each
        for each in lines
    )


def test_table_bytes_are_those_of_w1_w2_and_w(trained: TrainedRun) -> None:
    schema = json.loads((trained.data / "schema.json").read_text())
    rows = sum(feature["num_embeddings"] for feature in schema["sparse"])
    tables = len(schema["sparse"])
    assert trained.result["trained_table_bytes"] == 4 * (rows * 12 + tables * 12 * 4)
    assert trained.result["served_table_bytes"] == 4 * rows * 4


def test_a_single_layer_model_trains_on_three_ranks_and_two_epochs(
    small_model: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = [*small_model, "model.hidden_dim=null", "data.batch_size=96", "train.max_steps=null", "train.epochs=2"]
    result = mlet_json("train", CONFIG, *overrides, f"run.dir={tmp_path / 'run'}", "--nproc", 3)
    assert result["steps"] == 2 * (4800 // 96)
    assert result["trained_table_bytes"] == result["served_table_bytes"]
    assert result["test_rows"] == 601


def test_a_finished_run_is_replaced_only_when_asked_to(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", CONFIG, *trained.overrides, "train.max_steps=1", f"run.dir={run}"]
    mlet(*arguments)
    before = (run / "summary.json").read_text()
    assert "run.overwrite=true" in error_line(*arguments)
    faulty = ("model.builder=tests.helpers.own_networks:broken", "model.arguments.fault=mixes rows")
    assert "depends on other rows" in error_line(*arguments, *faulty, "run.overwrite=true")
    assert (run / "summary.json").read_text() == before
    mlet(*arguments, "run.overwrite=true", "train.max_steps=2")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    summary = json.loads((run / "summary.json").read_text())
    again = mlet_json(*arguments, "train.max_steps=2", "--once")  # it does not matter what the run replaced
    assert again == {key: value for key, value in summary.items() if key != "seal"}


def test_an_attempt_after_the_one_that_finished_shows_the_summary(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", CONFIG, *trained.overrides, f"run.dir={trained.path}"]
    assert "holds a finished run" in error_line(*arguments)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert mlet_json(*arguments) == trained.result
    assert "holds a finished run" in error_line(*arguments, "train.seed=7")


def test_an_id_outside_its_table_is_named_once_by_all_ranks(trained: TrainedRun, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in trained.data.rglob("*"):
        if path.is_file():
            target = data / path.relative_to(trained.data)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    part = next((data / "train").iterdir())
    table = pq.read_table(part)
    index = table.schema.get_field_index("C9")
    wrong = table.set_column(index, "C9", [[4321] * table.num_rows]).cast(table.schema)
    replace_part(data, f"train/{part.name}", wrong)
    overrides = [each for each in trained.overrides if not each.startswith("data.path")]
    done = mlet("train", CONFIG, *overrides, f"data.path={data}", f"run.dir={tmp_path / 'run'}", "--nproc", 2, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("mlet: error: ")]
    assert len(errors) == 1
    assert part.name in errors[0]
    assert "C9" in errors[0]
    assert "4321" in errors[0].replace(",", "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "never finished" in error_line("export", tmp_path / "run", "--out", tmp_path / "export")


def test_a_loss_that_is_not_finite_stops_the_run(small_model: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    message = mlet("train", CONFIG, *small_model, "optimizer.learning_rate=1e20", f"run.dir={run}", expect=2).stderr
    assert "optimizer.learning_rate" in message
    assert "Traceback" not in message
    assert not (run / "summary.json").exists()
    assert not list((run / "checkpoints").glob("*"))


def test_half_rows_with_adam_on_a_cpu_are_an_error(small_model: tuple[str, ...], tmp_path: Path) -> None:
    half = ("sharding.rows_dtype=fp16", "optimizer.name=adam", "train.device=cpu")
    assert "sharding.rows_dtype" in error_line("train", CONFIG, *small_model, *half, f"run.dir={tmp_path / 'run'}")


def test_cuda_that_is_not_there_is_an_error(small_model: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "train.device" in error_line(
        "train", CONFIG, *small_model, "train.device=cuda", f"run.dir={tmp_path / 'run'}"
    )
