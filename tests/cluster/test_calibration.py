"""`mlet doctor --distributed --calibrate`, and what `mlet plan` makes of the file."""

import json
from pathlib import Path

import pytest

from mlet_dist.cluster.collective_rates import group_sizes
from mlet_dist.config.calibration_file import COLLECTIVES, load_calibration
from tests.helpers.mlet_command import ROOT, error_line, mlet

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.mark.parametrize(
    ("world_size", "local_world_size", "sizes"),
    [(1, 1, []), (2, 2, [2]), (8, 8, [2, 4, 8]), (64, 8, [2, 8, 32, 64]), (1024, 8, [8, 512, 1024]), (6, 3, [2, 3, 6])],
)
def test_the_sizes_of_groups(world_size: int, local_world_size: int, sizes: list[int]) -> None:
    assert group_sizes(world_size, local_world_size) == sizes


@pytest.mark.e2e
@pytest.mark.multirank
def test_rates_are_measured_and_planned_with(tmp_path: Path) -> None:
    file, tables = tmp_path / "rates.yaml", tmp_path / "tables.yaml"
    file.write_text("an earlier file")
    done = mlet("doctor", "--distributed", "--nproc", 2, "--calibrate", file, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert f"written to {file}" in checks["rates"]["found"]
    found = load_calibration(file)
    assert (found.world_size, found.backend, len(found.hosts)) == (2, "gloo", 1)
    assert {(group.collective, group.ranks) for group in found.groups} == {(each, 2) for each in COLLECTIVES}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.yaml"]
    tables.write_text("C1: 100000\nC2: 50000\n")
    plan = json.loads(
        mlet(
            "plan", CONFIG, "--tables", tables, "--world-size", 2, "--device", "cpu", "--calibration", file, "--json"
        ).stdout
    )
    assert plan["device"]["memory_bandwidth"] == pytest.approx(found.memory_bandwidth_gbs * 1e9)
    assert plan["predicted_step_ms"]["host"] >= found.host_step_us / 1e3


def test_calibrate_needs_ranks_and_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "no" / "rates.yaml"
    line = error_line("doctor", "--distributed", "--nproc", 2, "--calibrate", file)
    assert line == f"mlet: error: --calibrate {file}: there is no directory {file.parent}"
    assert "--calibrate needs --distributed" in error_line("doctor", "--calibrate", tmp_path / "rates.yaml")
