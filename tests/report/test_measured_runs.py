"""Runs of several directories are told apart, and none counts twice."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.report import measured_runs as module
from mlet_dist.report.measured_runs import MeasuredRun, measured_runs
from mlet_dist.training.run_directory import RunDirectory
from tests.helpers.mlet_command import ROOT


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a directory, which is read as a single run with these settings."""
    made: dict[Path, MeasuredRun] = {}

    def run_of(name: str, dim: int, seed: int = 0) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.yaml").touch()
        settings = [f"model.embedding_dim={dim}", f"train.seed={seed}", "run.dir=x", "data.path=none"]
        config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", settings)
        made[path] = MeasuredRun(path.name, "mlet", config, {}, {}, path, None, {}, None)
        return path

    monkeypatch.setattr(module, "_single", made.__getitem__)
    return run_of


def test_arms_of_one_name_and_other_settings_stay_apart(run_of, tmp_path: Path) -> None:
    paths = [run_of(f"{day}/run", dim) for day, dim in (("monday", 4), ("tuesday", 8), ("wednesday", 16))]
    again = run_of("thursday/run", 16, seed=1)
    found = measured_runs([*paths, again])
    assert [run.arm for run in found] == ["run", "run (run)", *[f"run ({paths[2]})"] * 2]


def test_a_run_counts_once(run_of, capsys: pytest.CaptureFixture[str]) -> None:
    first, other_seed, repeated = run_of("a", 4), run_of("b", 4, seed=1), run_of("c", 4)
    assert [run.run for run in measured_runs([first, other_seed, first])] == [first, other_seed]
    assert capsys.readouterr().err == ""
    assert [(run.arm, run.seed) for run in measured_runs([first, other_seed, repeated])] == [("a", 0), ("a", 1)]
    assert f"{first} and {repeated} have the same settings and the same train.seed" in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False])
def test_a_run_of_a_sweep_that_is_named_by_itself_counts_once(
    first: bool, run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_of("runs/abc", 4)
    (run,) = measured_runs([path])
    monkeypatch.setattr(RunDirectory, "load", lambda _: (run.config, None, {"served_table_bytes": 10}))
    row = {"arm": "a", "kind": "mlet", "stage": "seed", "settings": "{}", "fault": None, "run": str(path)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "results.parquet")
    found = measured_runs([path, tmp_path] if first else [tmp_path, path])
    assert [each.arm for each in found] == ["a"]


def test_a_run_with_predictions_counts_rather_than_one_without(run_of, tmp_path: Path) -> None:
    (run,) = measured_runs([run_of("a", 4)])
    scored = dataclasses.replace(run, scores=tmp_path)
    assert module._each_seed_once([run, scored]) == [scored]


def test_a_run_that_two_sweeps_measured_has_the_outputs_of_both(run_of, tmp_path: Path) -> None:
    (run,) = measured_runs([run_of("a", 4)])
    first, second = (
        dataclasses.replace(run, scores=tmp_path, outputs={name: {"served_bytes": 1} for name in names})
        for names in (("dcp", "int8"), ("dcp", "int4"))
    )
    (found,) = module._each_seed_once([first, second])
    assert list(found.outputs) == ["dcp", "int8", "int4"]
    # Of two runs with the same settings, the one that is known in more outputs.
    other = dataclasses.replace(second, run=tmp_path / "other", scores=tmp_path / "other")
    more = dataclasses.replace(other, outputs={**first.outputs, **second.outputs})
    assert module._each_seed_once([first, other]) == [first]
    assert module._each_seed_once([first, more]) == [more]


def test_a_control_is_shown_with_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions recorded what was chosen for its MLET arm, of which the control has a multiple."""
    settings = ["run.dir=x", "data.path=none", "model.hidden_dim=null", "optimizer.rows_learning_rate=0.2"]
    config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", settings)
    monkeypatch.setattr(RunDirectory, "load", lambda run: (config, None, {"served_table_bytes": 10}))
    tuned = '{"optimizer.rows_learning_rate": 0.05, "model.nothing": 3}'
    row = {"arm": "c", "kind": "control", "stage": "seed", "settings": tuned, "fault": None, "run": str(tmp_path / "r"),
           "control_of": "mlet"}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "results.parquet")
    (found,) = measured_runs([tmp_path])
    assert found.tuned == {"optimizer.rows_learning_rate": 0.2}


def test_runs_of_a_sweep_without_scores_and_compressed_single_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version wrote them, and before the sweep has ended."""
    settings = ["train.seed=3", "run.dir=x", "data.path=none", "model.hidden_dim=null"]
    plain = load_config(ROOT / "configs" / "criteo_kaggle.yaml", settings)
    compressed = dataclasses.replace(
        plain, compression=dataclasses.replace(plain.compression, policy="static", budget=0.1)
    )
    configs = {"plain": plain, "small": compressed}
    summary = {"served_table_bytes": 10, "test_logloss": 0.5, "test_auc": None}
    monkeypatch.setattr(RunDirectory, "load", lambda run: (configs[run.path.name], None, summary))
    rows = [
        {"arm": name, "kind": "single", "stage": "seed", "settings": "{}", "fault": None, "run": str(tmp_path / name)}
        for name in configs
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "results.parquet")
    found = measured_runs([tmp_path])
    assert [(run.arm, run.kind, run.scores) for run in found] == [
        ("plain", "single", None),
        ("small", "single_compressed", None),
    ]
    assert found[0].outputs == {"dcp": {"served_bytes": 10, "test": {"logloss": 0.5}}}
    assert "the sweep has not ended yet" in capsys.readouterr().err
    (tmp_path / "results.txt").touch()
    measured_runs([tmp_path])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("recorded", [True, False])
def test_a_control_belongs_to_the_arm_of_its_sweep(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions did not record to which one; names say so there."""
    dims = {"monday": 4, "tuesday": 8}
    names = {"mlet": None, "own": None, "control of mlet": "mlet"}

    def load(run: RunDirectory) -> tuple[object, None, dict[str, int]]:
        settings = [f"model.embedding_dim={dims[run.path.parent.name]}", "run.dir=x", "data.path=none"]
        hidden_dim = {"mlet": 16, "own": 32}.get(run.path.name, "null")
        config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", [*settings, f"model.hidden_dim={hidden_dim}"])
        return config, None, {"served_table_bytes": 10}

    monkeypatch.setattr(RunDirectory, "load", load)
    for day in dims:
        (tmp_path / day).mkdir()
        rows = [
            {"arm": name, "kind": "mlet" if of is None else "control", "stage": "seed", "settings": "{}", "fault": None,
             "run": str(tmp_path / day / name), **({"control_of": of} if recorded else {})}
            for name, of in names.items()
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / day / "results.parquet")
    found = measured_runs([tmp_path / day for day in dims])
    assert {run.arm: run.control_of for run in found} == {
        "mlet": None,
        "own": None,
        "control of mlet": "mlet",
        "mlet (tuesday)": None,
        "own (tuesday)": None,
        "control of mlet (tuesday)": "mlet (tuesday)",
    }
