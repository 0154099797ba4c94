"""A sweep trains its arms by `mlet train`, and does nothing again that is done."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist.errors import UserError
from mlet_dist.sweep.arms import arms_of
from mlet_dist.sweep.sweep_file import SweepConfig
from tests.helpers.mlet_command import ROOT, mlet, mlet_json

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
    mlet_rate, control_rate = (
        yaml.safe_load((out / "arms" / f"{index:03}.yaml").read_text())["optimizer"] for index in (0, 2)
    )
    assert mlet_rate["learning_rate"] == result["arms"]["mlet"]["settings"]["optimizer.learning_rate"]
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
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(content))
    result = mlet_json("sweep", file, "--out", out)
    (fault,) = result["arms"]["mlet"]["faults"].values()
    assert fault.startswith("not finite at step ")
    assert f"mlet, seed 0: {fault}" in (out / "results.txt").read_text()
    assert "0 of 1" in (out / "results.txt").read_text()


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


def test_names_do_not_matter_for_the_runs(small_model: tuple[str, ...]) -> None:
    first, second = (
        arms_of(sweep_of(small_model, arms={name: {"model.hidden_dim": 12}}, baselines=False))[0]
        for name in ("mlet", "another name")
    )
    assert first.config == second.config


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"model.hidden_dim": 7}}, "arm 'a': command line: model.hidden_dim is 7, it must be a multiple of 4"),
        ({"a": {"model.hiden_dim": 8}}, "arm 'a': command line: model.hiden_dim: unknown key"),
        (
            {"a": {"model.hidden_dim": 8}, "b": {"model.hidden_dim": 8}},
            "arm 'b' has the settings of arm 'a'; leave one of them out",
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
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(content))
    done = mlet("sweep", file, "--out", out, "--json", expect=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mlet: error: "))
    (log,) = (out / "runs").glob("*.log")
    assert f"training failed with exit code 2; the end of {log}: " in line
    assert "train.initial_weights" in line
