"""A sweep trains its arms by `mlet train`, and does nothing again that is done."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.errors import UserError
from mlet_dist.quality.score_metrics import logloss
from mlet_dist.quality.scores_file import read_scores
from mlet_dist.sweep.arms import arms_of
from mlet_dist.sweep.logged_commands import LoggedCommands
from mlet_dist.sweep.run_sweep import _check_data, _environment, run_sweep
from mlet_dist.sweep.sweep_file import Interval, SweepConfig, TuneConfig
from mlet_dist.sweep.trained_points import Outcome
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.train_in_ranks import Ranks, train_in_ranks
from tests.helpers.two_labels import two_labels

CONFIG = str(ROOT / "configs" / "criteo_kaggle.yaml")


def settings_of(small_model: tuple[str, ...]) -> dict[str, object]:
    pairs = (each.split("=", 1) for each in small_model)
    return {name: yaml.safe_load(value) for name, value in pairs}


@pytest.mark.e2e
def test_arms_are_tuned_trained_with_each_seed_and_not_trained_again(
    small_model: tuple[str, ...], tmp_path: Path
) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "config": CONFIG,
        "settings": settings_of(small_model) | {"train.max_steps": 6},
        "arms": {"mlet": {"model.hidden_dim": 12}},
        "tune": {
            "settings": {"optimizer.learning_rate": {"low": 0.01, "high": 0.1}},
            "trials": 2, "steps": 4, "first_steps": 2, "keep": 2,
        },
        "seeds": [3, 4],
        "outputs": ["dcp", "int8"],
        "workers": 2,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    result = mlet_json("sweep", file, "--out", out)
    assert list(result["arms"]) == ["mlet", "single of mlet", "control of mlet"]
    rows = pq.read_table(out / "results.parquet").to_pylist()
    seeds = [row for row in rows if row["stage"] == "seed"]
    assert sorted((row["arm"], row["seed"]) for row in seeds) == sorted(
        (arm, seed) for arm in result["arms"] for seed in (3, 4)
    )
    assert sum(row["stage"] == "tune" for row in rows) == 4
    assert all(row["steps"] == 6 and 0 < row["test_auc"] < 1 for row in seeds)
    assert {(row["control_of"], row["runs_at_once"]) for row in seeds if row["arm"] == "control of mlet"} == {
        ("mlet", 2)
    }
    for row in rows:
        assert (row["outputs"] is not None) == (row["stage"] == "seed")
    for row in seeds:
        outputs = json.loads(row["outputs"])
        assert list(outputs) == ["dcp", "int8"]
        assert outputs["int8"]["served_bytes"] < outputs["dcp"]["served_bytes"] == row["served_table_bytes"]
        for split in ("valid", "test"):
            for name, each in outputs.items():
                found = read_scores(Path(row["scores"]) / split / f"{name}.parquet")
                assert logloss(found) == pytest.approx(each[split]["logloss"], abs=1e-6)
            assert outputs["dcp"][split]["logloss"] == pytest.approx(row[f"{split}_logloss"], abs=1e-5)
    assert not list((out / "runs").glob("*-export"))

    # A report is about these runs, also where the sweep was moved.
    moved = shutil.copytree(out, tmp_path / "moved")
    for path in (out, moved):
        report = mlet_json("report", path, "--out", tmp_path / f"report of {path.name}", "--margin", "0.5")
        assert report["reference"] == "single of mlet"
        assert report["recommended"]["output"] == "int8"
        assert {arm: each["seeds"] for arm, each in report["arms"].items()} == {arm: [3, 4] for arm in result["arms"]}
        for output in report["outputs"]:
            own = [row for row in seeds if row["arm"] == output["arm"]]
            measured = {
                str(row["seed"]): json.loads(row["outputs"])[output["output"]]["test"]["logloss"] for row in own
            }
            assert output["test"]["logloss"]["by_seed"] == pytest.approx(measured, abs=1e-6)
            assert output["training_bytes"] == own[0]["training_bytes_peak"]
        for arm in report["arms"].values():
            assert set(arm["by_class"]) == {"frequent", "medium", "rare"}
            assert arm["energy"][-1] == pytest.approx(1)
            assert arm["cost"]["step_ms"] > 0
            assert arm["cost"]["runs_at_once"] == 2
        page = (tmp_path / f"report of {path.name}" / "report.html").read_text()
        assert "Step times were measured with up to 2 runs at a time on one machine" in page
    shutil.rmtree(moved)
    mlet_rate, control_rate = (
        yaml.safe_load((out / "arms" / f"{index:03}.yaml").read_text())["optimizer"] for index in (0, 2)
    )
    assert mlet_rate["learning_rate"] == result["arms"]["mlet"]["settings"]["optimizer.learning_rate"]
    assert result["arms"]["control of mlet"]["settings"] == {
        f"optimizer.{name}": control_rate[name] for name in ("learning_rate", "rows_learning_rate")
    }
    # k = 12 and σ = 0.25: kσ² = 0.75.
    assert control_rate["rows_learning_rate"] == pytest.approx(mlet_rate["learning_rate"] * 0.75)

    # With one seed more, the runs of that seed alone are trained.
    runs = {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    file.write_text(yaml.safe_dump(content | {"seeds": [3, 4, 5]}))
    printed = mlet("sweep", file, "--out", out).stdout
    assert printed.strip() == (out / "results.txt").read_text().strip()
    assert "3 of 3" in printed
    after = {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert len(after) == len(runs) + 3  # one for each arm
    assert after.items() > runs.items()


@pytest.mark.e2e
def test_a_run_that_diverges_is_a_result_and_not_an_error(small_model: tuple[str, ...], tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "config": CONFIG,
        "settings": settings_of(small_model) | {"train.max_steps": 6, "optimizer.learning_rate": 1e20},
        "arms": {"mlet": {"model.hidden_dim": 12}},
        "baselines": False,
        "outputs": [],
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(content))
    result = mlet_json("sweep", file, "--out", out)
    (fault,) = result["arms"]["mlet"]["faults"].values()
    assert fault.startswith("not finite at step ")
    assert f"mlet, seed 0: {fault}" in (out / "results.txt").read_text()
    assert "0 of 1" in (out / "results.txt").read_text()


@pytest.mark.e2e
def test_two_processes_share_the_work_and_each_ends_with_all_results(
    small_model: tuple[str, ...], tmp_path: Path
) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "config": CONFIG,
        "settings": settings_of(small_model) | {"train.max_steps": 3},
        "arms": {"one": {"model.hidden_dim": 8}, "two": {"model.hidden_dim": 12}},
        "baselines": False,
        "seeds": [0],
        "outputs": ["dcp"],
    }
    file.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "mlet_dist", "sweep", str(file), "--out", str(out), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    # While they work, another sweep may not.
    deadline = time.monotonic() + 120
    while not (out / ".mlet-sweep").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content | {"seeds": [1]}))
    assert "another sweep works into it (process " in error_line("sweep", other, "--out", out)
    seen: set[str] = set()
    while any(process.poll() is None for process in both):
        if (out / "results.parquet").exists():
            found = {row["arm"] for row in pq.read_table(out / "results.parquet").to_pylist()}
            assert seen <= found  # what one process has found, the other one leaves there
            seen = found
        time.sleep(0.02)
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in printed)
    assert first == second
    assert first["runs"] == 2
    logs = list((out / "runs").glob("*.log"))
    assert len(logs) == 2
    for log in logs:
        for command_ in ("train", "export"):
            assert log.read_text().count(f"$ mlet {command_} ") == 1
    assert {row["arm"] for row in pq.read_table(out / "results.parquet").to_pylist()} == {"one", "two"}


def test_workers_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    sweep = SweepConfig(config=CONFIG, workers=2, nproc=2)
    assert [_environment(worker, sweep)["CUDA_VISIBLE_DEVICES"] for worker in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert _environment(1, sweep)["CUDA_VISIBLE_DEVICES"] == "3,1"
    with pytest.raises(
        UserError, match="workers is 3 and nproc 2, which takes 6 GPUs, and this machine has 4; lower wo"
    ):
        _environment(0, dataclasses.replace(sweep, workers=3))
    with pytest.raises(UserError, match="nproc is 8, and this machine has 4 GPUs; lower nproc to 4"):
        _environment(0, dataclasses.replace(sweep, workers=1, nproc=8))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert _environment(5, sweep) == {}


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.openmp.os.sched_getaffinity", lambda _: range(88), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(workers: int, ranks: int) -> str | None:
        return LoggedCommands(workers)._environment(ranks).get("OMP_NUM_THREADS")

    assert threads(workers=8, ranks=1) == "11"
    assert threads(workers=2, ranks=4) == "11"
    assert threads(workers=100, ranks=1) == "1"
    assert threads(workers=1, ranks=8) is None  # `mlet train --nproc 8` divides the cores itself
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(workers=8, ranks=1) == "3"


def sweep_of(small_model: tuple[str, ...], **keys: object) -> SweepConfig:
    return SweepConfig(config=CONFIG, settings=settings_of(small_model), **keys)  # type: ignore[arg-type]


def test_a_grid_has_an_arm_for_each_combination_and_each_single_layer_once(small_model: tuple[str, ...]) -> None:
    arms = arms_of(sweep_of(small_model, grid={"model.embedding_dim": [4, 8], "model.hidden_dim": [8, 16]}))
    assert [arm.name for arm in arms if arm.kind == "mlet"] == [
        "embedding_dim=4 hidden_dim=8",
        "embedding_dim=4 hidden_dim=16",
        "embedding_dim=8 hidden_dim=8",
        "embedding_dim=8 hidden_dim=16",
    ]
    assert [arm.name for arm in arms if arm.kind == "single"] == [
        "single of embedding_dim=4 hidden_dim=8",
        "single of embedding_dim=8 hidden_dim=8",
    ]
    controls = [arm for arm in arms if arm.kind == "control"]
    assert [arm.control_of for arm in controls] == [arm.name for arm in arms if arm.kind == "mlet"]


def test_a_setting_that_an_arm_has_itself_is_not_tuned_for_it_but_for_its_single_layer(
    small_model: tuple[str, ...],
) -> None:
    frozen = {"model.hidden_dim": 8, "optimizer.projections_learning_rate": 0}
    sweep = sweep_of(
        small_model,
        arms={
            "mlet": {"model.hidden_dim": 8},
            "frozen": frozen,
            "orthogonal": {**frozen, "model.projection_init": "orthogonal", "optimizer.rows_learning_rate": 0.1},
        },
        tune=TuneConfig(
            settings={
                "optimizer.rows_learning_rate": Interval(0.01, 1.0),
                "optimizer.projections_learning_rate": Interval(0.01, 0.1),
            }
        ),
    )
    arms = {arm.name: arm for arm in arms_of(sweep)}
    rows, projections = "optimizer.rows_learning_rate", "optimizer.projections_learning_rate"
    assert {name: arm.tuned_settings(sweep) for name, arm in arms.items() if arm.control_of is None} == {
        "mlet": [rows, projections],
        "frozen": [rows],
        "orthogonal": [],
        "single of mlet": [rows, projections],  # that of the other arms, but for W2, which it does not have
        "single of orthogonal": [rows, projections],
    }
    assert arms["frozen"].config.optimizer.projections_learning_rate == 0
    assert not any(arm.tuned_settings(sweep) for arm in arms.values() if arm.kind == "control")


def test_a_single_layer_that_is_not_tuned_does_not_take_the_place_of_one_that_is(
    small_model: tuple[str, ...],
) -> None:
    rate = "optimizer.rows_learning_rate"
    sweep = sweep_of(
        small_model,
        arms={
            "single": {"model.hidden_dim": None, rate: 0.05},
            "of W2 alone": {"model.hidden_dim": 8, "optimizer.projections_learning_rate": 0},
        },
        tune=TuneConfig(settings={rate: Interval(0.01, 1.0)}),
    )
    sweep = dataclasses.replace(sweep, settings=sweep.settings | {rate: 0.05})
    tuned = {arm.name: arm.tuned_settings(sweep) for arm in arms_of(sweep) if arm.kind == "single"}
    assert tuned == {"single": [], "single of of W2 alone": [rate]}
    # Without anything to tune, or of tables without a W2 anyway, they are the same.
    for same in (
        dataclasses.replace(sweep, tune=TuneConfig()),
        dataclasses.replace(sweep, arms=sweep.arms | {"single": {"model.hidden_dim": None}}),
        dataclasses.replace(
            sweep,
            settings=sweep.settings | {"model.single_layer_up_to": 0},
            arms=sweep.arms | {"single": {"model.hidden_dim": None}},
        ),
    ):
        assert [arm.name for arm in arms_of(same) if arm.kind == "single"] == ["single"]


def test_a_run_to_go_on_from_is_refused(small_model: tuple[str, ...]) -> None:
    for settings, own in (({"train.resume": "runs/x"}, {}), ({}, {"train.resume": "runs/x"})):
        sweep = sweep_of(small_model, arms={"a": {"model.hidden_dim": 8, **own}})
        with pytest.raises(UserError, match=r"arm 'a': train\.resume is runs/x; each run of a sweep begins by itself"):
            arms_of(dataclasses.replace(sweep, settings=sweep.settings | settings))


def test_a_sweep_that_is_stopped_leaves_nothing_that_looks_chosen(
    small_model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of a trial are not those of the arm, and what another sweep chose and found is not this one's."""
    tried = []

    def interrupted(points: object, config: Config, start: Config | None = None, *, keep: bool = False) -> Outcome:
        tried.append(config.optimizer.learning_rate)
        if not keep and len(tried) > 1:
            raise UserError("stopped")
        sizes = {"served_table_bytes": 10, "training_bytes_peak": 20}
        return Outcome(tmp_path / f"run-{len(tried)}", {"valid_logloss": 0.5, "test_logloss": 0.5, **sizes}, 1.0)

    monkeypatch.setattr("mlet_dist.sweep.run_sweep.TrainedPoints.train", interrupted)
    plain = sweep_of(small_model, arms={"a <ü>": {"model.hidden_dim": 8}}, baselines=False, seeds=(0,), outputs=())
    arms, text = tmp_path / "out" / "arms", tmp_path / "out" / "results.txt"
    (tmp_path / "out" / "runs").mkdir(parents=True)
    run_sweep(plain, tmp_path / "out")
    chosen = (arms / "000.yaml").read_text()
    assert chosen.startswith('# arm "a <\\u00fc>"\n')
    assert load_config(arms / "000.yaml").model.hidden_dim == 8
    assert text.exists()
    # The same sweep again finds what it has.
    run_sweep(plain, tmp_path / "out")
    assert (arms / "000.yaml").read_text() == chosen

    tried.clear()
    tuned = TuneConfig(settings={"optimizer.learning_rate": Interval(0.01, 1.0)}, trials=2, steps=1)
    with pytest.raises(UserError, match="stopped"):
        run_sweep(dataclasses.replace(plain, tune=tuned), tmp_path / "out")
    assert len(tried) == 2
    assert not text.exists()
    assert [path.name for path in arms.iterdir() if not path.name.startswith(".")] == []


def test_names_do_not_matter_for_the_runs(small_model: tuple[str, ...]) -> None:
    first, second = (
        arms_of(sweep_of(small_model, arms={name: {"model.hidden_dim": 12}}, baselines=False))[0]
        for name in ("mlet", "another name")
    )
    assert first.config == second.config


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"model.hidden_dim": 7}}, "arm 'a': settings of the sweep: model.hidden_dim is 7, it must be a mult"),
        ({"a": {"model.hiden_dim": 8}}, "arm 'a': settings of the sweep: model.hiden_dim: unknown key"),
        (
            {"a": {"model.hidden_dim": 8}, "b": {"model.hidden_dim": 8}},
            "arm 'b' has the settings of arm 'a'; leave one of them out",
        ),
        (
            {"a": {"model.hidden_dim": 8}, "control of a": {"model.hidden_dim": 12}},
            "arm 'control of a' of the file has the name of a baseline that the sweep adds; give it another name",
        ),
    ],
)
def test_an_arm_with_wrong_settings_is_named(
    arms: dict[str, object], message: str, small_model: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        arms_of(sweep_of(small_model, arms=arms))
    assert str(error.value).startswith(message)


@pytest.mark.e2e
def test_a_run_that_fails_is_named_with_its_log(small_model: tuple[str, ...], tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "config": CONFIG,
        "settings": settings_of(small_model) | {"train.max_steps": 6, "train.initial_weights": str(tmp_path / "none")},
        "arms": {"mlet": {"model.hidden_dim": 12}},
        "baselines": False,
        "outputs": [],
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(content))
    done = mlet("sweep", file, "--out", out, "--json", expect=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mlet: error: "))
    (log,) = (out / "runs").glob("*.log")
    assert f"training failed with exit code 2; the end of {log}: " in line
    assert "train.initial_weights" in line


@pytest.fixture(scope="module")
def of_two_labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of a model of clicks and conversions."""
    return {
        "data.path": str(two_labels(tmp_path_factory.mktemp("labels"), rows=600)),
        "data.batch_size": 48,
        "model.builder": "docs.multi_task_network:build",
        "model.arguments": {"experts": 2, "width": 4},
        "model.embedding_dim": 4,
        "train.max_steps": 4,
    }


@pytest.mark.e2e
def test_several_labels_have_columns_of_their_own_and_trials_go_on_from_initial_weights(
    ranks: Ranks, of_two_labels: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = {**of_two_labels, "model.hidden_dim": 8, "run.dir": str(tmp_path / "start")}
    train_in_ranks(ranks, 1, *(f"{name}={value}" for name, value in start.items()))
    sweep = SweepConfig(
        config=CONFIG,
        settings=of_two_labels | {"train.initial_weights": str(tmp_path / "start")},
        arms={"mlet": {"model.hidden_dim": 8}},
        baselines=False,
        tune=TuneConfig(
            {"optimizer.learning_rate": Interval(0.01, 0.02)},
            trials=1, steps=4, first_steps=2, keep=2, metric="conversion_logloss",
        ),
        seeds=(0,),
    )  # fmt: skip
    capfd.readouterr()
    result = run_sweep(sweep, tmp_path / "out")
    assert result["arms"]["mlet"]["faults"] == {}
    # Lines name the metric and the split: of a trial those by which it is chosen.
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    (trial,) = [row for row in rows if row["stage"] == "tune"]
    valid, test = (
        f"{split} conversion LogLoss {trial[f'{split}_conversion_logloss']:.4f}" for split in ("valid", "test")
    )
    shown = capfd.readouterr().err.splitlines()
    (line,) = [line for line in shown if line.startswith("mlet, trial of 4 steps, ")]
    assert line.endswith(f": {valid}")
    assert f"mlet, seed 0: {valid}, {test}" in shown
    assert shown[-1].startswith("sweep 2/2 runs")
    assert shown[-1].endswith(f"best mlet {valid}")
    # The trial and the run with the seed have the same settings; the checkpoint of the run is kept.
    assert rows[0]["run"] == rows[1]["run"]
    assert list((Path(rows[1]["run"]) / "checkpoints").iterdir())
    assert [(row["stage"], row["steps"]) for row in rows] == [("tune", 4), ("seed", 4)]
    for split in ("valid", "test"):
        for label in ("click", "conversion"):
            assert all(math.isfinite(row[f"{split}_{label}_{name}"]) for row in rows for name in ("auc", "logloss"))
        assert f"{split}_auc" not in rows[0]
    shown = (tmp_path / "out" / "results.txt").read_text()
    for title in ("test click LogLoss", "test click AUC", "test conversion LogLoss", "test conversion AUC"):
        assert title in shown
    assert f"{rows[1]['test_conversion_logloss']:.4f}" in shown


def test_a_metric_that_the_data_does_not_have_is_refused_before_training(
    of_two_labels: dict[str, object], small_model: tuple[str, ...], tmp_path: Path
) -> None:
    def refused(metric: str, **arms: dict[str, object]) -> str:
        tune = TuneConfig({"optimizer.learning_rate": Interval(0.01, 0.02)}, trials=1, steps=1, metric=metric)
        arms = {name: {"model.hidden_dim": 8, **settings} for name, settings in arms.items()}
        with pytest.raises(UserError) as error:
            run_sweep(
                SweepConfig(CONFIG, of_two_labels, arms, baselines=False, tune=tune, seeds=(0,)), tmp_path / "out"
            )
        assert not (tmp_path / "out" / "runs").exists()
        return str(error.value)

    expected = "tune.metric is sale_auc; the data set's labels have auc, logloss, click_auc, click_logloss, "
    assert refused("sale_auc", mlet={}).startswith(expected)
    other = settings_of(small_model)["data.path"]
    message = refused("logloss", mlet={}, other={"data.path": other, "model.hidden_dim": 12})
    assert message.startswith(f"{other}: has the labels label, and ")
    (tmp_path / "raw").mkdir()
    few = {"by": "rows", "shares": {"train": 0.9, "valid": 0.002, "test": 0.098}}
    two_rows = two_labels(tmp_path / "raw", 600, split=few)
    message = refused("conversion_auc", mlet={"data.path": str(two_rows)})
    assert message.startswith(f"tune.metric is conversion_auc, which the split valid of {two_rows} leaves undefined: ")


def test_a_split_of_one_class_that_is_to_be_scored_is_refused_before_training(
    of_two_labels: dict[str, object], tmp_path: Path
) -> None:
    one_row = two_labels(tmp_path, 600, split={"by": "rows", "shares": {"train": 0.9, "valid": 0.002, "test": 0.098}})
    settings = of_two_labels | {"data.path": str(one_row)}
    sweep = SweepConfig(CONFIG, settings, {"mlet": {"model.hidden_dim": 8}}, baselines=False, seeds=(0,))
    with pytest.raises(UserError) as error:
        run_sweep(sweep, tmp_path / "out")
    problem, _, remedy = str(error.value).partition(". ")
    assert problem.startswith(f"{one_row}: all 1 rows of valid that have the label conversion have 1, so its AUC is un")
    assert remedy.startswith("The outputs fp16, int8, int4 are verified by their AUC: set outputs to [dcp], or")
    assert not (tmp_path / "out").exists()
    # Outputs in float32 are verified by their logits.
    (arm,) = arms_of(sweep)
    for outputs in (("dcp",), ()):
        _check_data(arm, arm, dataclasses.replace(sweep, outputs=outputs))


def test_a_tuned_setting_that_does_not_exist_is_named_before_anything_is_trained(small_model: tuple[str, ...]) -> None:
    tune = TuneConfig(settings={"optimizer.lerning_rate": Interval(0.1, 1.0)})
    with pytest.raises(UserError, match=r"arm 'a': .*optimizer\.lerning_rate: unknown key \(did you mean"):
        arms_of(sweep_of(small_model, arms={"a": {"model.hidden_dim": 8}}, tune=tune))
