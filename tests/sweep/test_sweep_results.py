"""The file of results has what all processes of a sweep have found, and nothing of another sweep."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.sweep.arms import Arm
from mlet_dist.sweep.sweep_results import Result, write_results
from mlet_dist.sweep.trained_points import Outcome
from tests.helpers.mlet_command import ROOT


def result_of(arm: str, loss: float, runs_at_once: int | None = None) -> Result:
    config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", ["run.dir=x", "data.path=none"])
    outcome = Outcome(Path("runs") / arm, {"steps": 3, "test_logloss": loss}, 1.0, None, runs_at_once)
    return Result(Arm(arm, config, "control", "mlet"), "seed", config, {}, outcome)


def rows_of(path: Path) -> dict[str, float]:
    return {row["arm"]: row["test_logloss"] for row in pq.read_table(path).to_pylist()}


def test_results_of_other_processes_stay_until_a_process_has_all(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    write_results([result_of("one", 0.5)], path, ["label"], "sweep", complete=False)
    write_results([result_of("two", 0.6)], path, ["label"], "sweep", complete=False)
    assert rows_of(path) == {"one": 0.5, "two": 0.6}
    # Each process adds to what it has written before.
    write_results([result_of("one", 0.5), result_of("three", 0.7)], path, ["label"], "sweep", complete=False)
    assert rows_of(path) == {"one": 0.5, "two": 0.6, "three": 0.7}
    assert pq.read_table(path).num_rows == 3
    write_results([result_of("one", 0.5), result_of("two", 0.6)], path, ["label"], "sweep")
    assert rows_of(path) == {"one": 0.5, "two": 0.6}


@pytest.mark.parametrize("before", ["other sweep", "damaged"])
def test_results_of_another_sweep_are_replaced(before: str, tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    if before == "damaged":
        path.write_text("no")
    else:
        write_results([result_of("one", 0.5)], path, ["click", "buy"], before)
    write_results([result_of("two", 0.6)], path, ["label"], "sweep", complete=False)
    assert rows_of(path) == {"two": 0.6}


def test_what_a_report_needs_of_an_arm_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    write_results([result_of("one", 0.5, 4)], path, ["label"], "sweep")
    (row,) = pq.read_table(path).to_pylist()
    assert (row["kind"], row["control_of"], row["runs_at_once"]) == ("control", "mlet", 4)
