"""`mlet doctor --distributed`, run by several ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.mlet_command import ROOT, error_line, mlet, torchrun_mlet

pytestmark = [pytest.mark.e2e, pytest.mark.multirank]

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def test_every_rank_under_torchrun_takes_part(small_model: tuple[str, ...], tmp_path: Path) -> None:
    settings = [*small_model, f"run.dir={tmp_path / 'run'}"]
    done = torchrun_mlet(2, "doctor", "--distributed", CONFIG, *settings, "--json", NCCL_DEBUG="WARN")
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    found = {check["name"]: check for check in result["checks"]}
    assert list(found) == ["ranks", "settings", "all-reduce", "storage"]
    assert {check["status"] for check in found.values()} == {"ok"}
    assert re.match(r"2 on \S+ \(2\); python 3", found["ranks"]["found"])
    assert "NCCL_DEBUG=WARN" in found["settings"]["found"]
    assert re.fullmatch(r"16 MiB over 2 ranks in [\d.]+ ms, [\d.]+ GB/s a rank", found["all-reduce"]["found"])
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_one_line_beside_the_table(small_model: tuple[str, ...], tmp_path: Path) -> None:
    settings = [*small_model, f"data.path={tmp_path / 'nothing'}", f"run.dir={tmp_path / 'run'}"]
    done = mlet("doctor", "--distributed", CONFIG, *settings, "--nproc", 2, expect=2)
    (line,) = done.stderr.splitlines()
    assert re.match(r"mlet: error: rank 0 on \S+ and 1 more: ", line)
    assert f"{tmp_path / 'nothing'}: no such data set" in line
    shown = done.stdout.splitlines()
    assert any(each.startswith("fail  wrong") and "no such data set" in each for each in shown)
    assert any(each.startswith("ok    all-reduce") for each in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doctor", CONFIG), "CONFIG needs --distributed"),
        (("doctor", "--nproc", 2), "--nproc needs --distributed"),
        (("train", CONFIG, "--nnodes", 2), "--nnodes needs --nproc"),
        (
            ("train", CONFIG, "--nproc", 2, "--node-rank", 1),
            "--node-rank needs --nnodes, the number of nodes of the job",
        ),
        (
            ("train", CONFIG, "--nproc", 2, "--nnodes", 2),
            "--node-rank is not set; it must be this node's number, from 0 to 1",
        ),
        (("train", CONFIG, "--nproc", 2, "--nnodes", 2, "--node-rank", 2), "--node-rank is 2"),
        (("train", CONFIG, "--nproc", 2, "--nnodes", 2, "--node-rank", 1), "--master-addr is not set"),
        (
            (
                "train",
                CONFIG,
                "--nproc",
                2,
                "--nnodes",
                2,
                "--node-rank",
                1,
                "--master-addr",
                "a",
                "--master-port",
                70000,
            ),
            "--master-port is 70000; it must be from 1 to 65535",
        ),
        (("train", CONFIG, "--nproc", 2, "--nnodes", "x", "--node-rank", 1), "--nnodes x: must be a number of nodes"),
    ],
)
def test_options_that_cannot_be_combined(arguments: tuple[object, ...], message: str) -> None:
    assert message in error_line(*arguments)
