"""The calibration file: written and read back, and refused if anything in it is wrong."""

import dataclasses
from pathlib import Path

import pytest

from mlet_dist.config.calibration_file import COLLECTIVES, Calibration, GroupRates, load_calibration, write_calibration
from mlet_dist.errors import UserError

FOUND = Calibration(
    date="2026-11-30T01:02:03+00:00",
    device="cpu",
    backend="gloo",
    hosts=("a", "b"),
    versions={"torch": "2.13.0"},
    world_size=4,
    local_world_size=2,
    threads=1,
    memory_bandwidth_gbs=2.5,
    tflops=0.05,
    million_ids_per_s=12.5,
    launch_us=2.0,
    host_step_us=8000.0,
    host_table_us=120.5,
    groups=tuple(
        GroupRates(collective, ranks, nodes, 100.25, 1.5)
        for collective in COLLECTIVES
        for ranks, nodes in ((2, 1), (4, 2))
    ),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rates.yaml"
    write_calibration(path, FOUND)
    return path


def test_what_was_written_is_read_back(file: Path) -> None:
    assert load_calibration(file) == FOUND
    alone = dataclasses.replace(FOUND, world_size=1, local_world_size=1, groups=())
    write_calibration(file, alone)
    assert load_calibration(file) == alone
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--calibrate .*/no/rates\.yaml: cannot be written: No such file or directory"
    ):
        write_calibration(tmp_path / "no" / "rates.yaml", FOUND)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: 1", "format: 2", "format is 2, and this version reads 1; calibrate again"),
        ("format: 1", "version: 1", "not a calibration; `mlet doctor --distributed --calibrate FILE` writes one"),
        ("threads: 1", "thread: 1", "unknown key thread; the keys are date, device"),
        ("threads: 1\n", "", "threads is missing; calibrate again"),
        ("threads: 1", "threads: 0", "threads is 0, it must be a whole number from 1 to 131,072"),
        ("threads: 1", "threads: true", "threads is True, it must be a whole number"),
        ("tflops: 0.05", "tflops: .nan", "tflops is nan, it must be a number from 1e-09 to 1e+09"),
        ("tflops: 0.05", "tflops: -1", "tflops is -1, it must be a number from 1e-09"),
        ("host_step_us: 8000.0", "host_step_us: fast", "host_step_us is 'fast', it must be a number from 0 to"),
        ("world_size: 4", "world_size: 2", "groups[1].ranks is 4, it must be a whole number from 2 to 2"),
        ("backend: gloo", "backend: nccl", "device is 'cpu' and backend is 'nccl'; they must be cpu and gloo"),
        ("hosts: [a, b]", "hosts: []", "hosts is [], it must be a list of names"),
        ("hosts: [a, b]", "hosts: [a, 3]", "hosts[1] is 3, it must be text"),
        ("torch: 2.13.0", "torch: 2", "versions.torch is 2, it must be text"),
        ("date: '2026-11-30T", "date: 'on 2026-11-30T", "date is 'on 2026-11-30T01:02:03+00:00', it must be a time"),
        ("latency_us: 100.25", "latency_us: 0", "groups[0].latency_us is 0, it must be a number from 0.001"),
        (
            "collective: all_reduce",
            "collective: gather",
            "groups[2].collective is 'gather', it must be one of all_to_all",
        ),
        ("ranks: 4, nodes: 2", "ranks: 2, nodes: 1", "groups[1]: all_to_all of 2 ranks on 1 nodes is given twice"),
        ("ranks: 4, nodes: 2", "ranks: 4, nodes: 5", "groups[1].nodes is 5, it must be a whole number from 1 to 4"),
        ("gbs: 1.5", "gbs: 1.5, more: 1", "unknown key groups[0].more; the keys are collective, ranks"),
        ("collective: all_gather", "collective: all_to_all", "is given twice"),
        ("threads: 1", "threads: 1\nthreads: 2", "not valid YAML in line"),
        ("groups:", "groups: 3\nrest:", "unknown key rest"),
    ],
)
def test_a_wrong_file_is_refused(old: str, new: str, message: str, file: Path) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1) if "collective: all_" not in old else text.replace(old, new))
    with pytest.raises(UserError) as error:
        load_calibration(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_missing_collectives_are_refused(file: Path) -> None:
    groups = [group for group in FOUND.groups if group.collective != "all_reduce"]
    write_calibration(file, dataclasses.replace(FOUND, groups=tuple(groups)))
    with pytest.raises(UserError, match="groups has no all_reduce; calibrate again"):
        load_calibration(file)


def test_no_file_and_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: cannot read the calibration: No such file"):
        load_calibration(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a calibration"):
        load_calibration(tmp_path / "list.yaml")
