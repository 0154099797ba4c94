"""`torchx run -s slurm` on a running Slurm: a job of two nodes reaches COMPLETED, and is requeued after a crash."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT
from tests.helpers.slurm_cluster import SlurmCluster, missing
from tests.helpers.torchx_cli import COMPONENTS, torchx
from tests.launch.test_local import checkpoints, command_line

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slurm,
    pytest.mark.skipif(missing() != "", reason=missing()),
]

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "it") as cluster:
        yield cluster


def submit(slurm: SlurmCluster, environment: dict[str, str], trained: TrainedRun, run: Path, *more: object) -> str:
    """Submit a job and return its id."""
    settings = [each for each in trained.overrides if not each.startswith("data.path=")]
    command = torchx("run", "-s", "slurm", "-cfg", "partition=batch", f"{ROOT / COMPONENTS}:train", "--config", CONFIG)
    command += ["--data", trained.data, "--run", run, "-j", "2x1", "--wait", 60, *more, "--", *settings]
    # After the submission, torchx queries the state of the job in the accounting, which this Slurm does not have.
    handle = slurm.run(*command, "train.checkpoint_every=3", environment=environment, check=False)
    return handle.split("slurm://torchx/")[1].split()[0]


def wait_for(slurm: SlurmCluster, job: str, run: Path, state: str, seconds: float = 240) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while (found := slurm.state(job))["JobState"] != state:
        assert found["JobState"] not in ("FAILED", "CANCELLED", "NODE_FAIL"), slurm.logs()
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.5)
    return found


def ranks(run: Path) -> list[int]:
    """Return the ids of the ranks that train a run, without the `mlet` processes that monitor them."""
    found = []
    for entry in Path("/proc").iterdir():
        words = command_line(int(entry.name)) if entry.name.isdecimal() else []
        if f"run.dir={run}" in words and "mlet_dist" in words and "--nnodes" not in words:
            found.append(int(entry.name))
    return found


def test_two_nodes_train_export_and_complete(
    slurm: SlurmCluster, torchx_environment: dict[str, str], trained: TrainedRun, tmp_path: Path
) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    job = submit(slurm, torchx_environment, trained, run, "--export", export)
    found = wait_for(slurm, job, run, "COMPLETED")
    assert found["Restarts"] == "0"
    assert found["NodeList"] in ("node1", "node2")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_sha256"] == trained.result["weights_sha256"]
    assert summary["world_size"] == 2
    assert (export / "manifest.json").exists()


def test_a_crash_is_requeued_and_does_not_change_the_result(
    slurm: SlurmCluster, torchx_environment: dict[str, str], trained: TrainedRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, torchx_environment, trained, run, "--max_restarts", 0)
    deadline = time.monotonic() + 120
    while checkpoints(run) == 0:
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.01)
    os.kill(ranks(run)[0], signal.SIGKILL)
    found = wait_for(slurm, job, run, "COMPLETED")
    assert int(found["Restarts"]) >= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["first_step"] > 0
    assert summary["weights_sha256"] == trained.result["weights_sha256"]
