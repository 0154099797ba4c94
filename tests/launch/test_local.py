"""`torchx run -s local_cwd` with two nodes, a rank of which is killed: the weights are those of an undisturbed run.

What happens when a whole node is lost is tested in tests/cluster/test_ends.py.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT
from tests.helpers.torchx_cli import COMPONENTS, last_json, torchx

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> Iterator[int]:
    """Yield all descendants of a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield child
        yield from descendants(child)


def agent_of(job: int, node: int) -> int:
    """Return the `mlet train` process of a node, which monitors its ranks."""
    wanted = ["--node-rank", str(node)]
    (found,) = [
        pid
        for pid in descendants(job)
        if any(command_line(pid)[at : at + 2] == wanted for at in range(len(command_line(pid))))
    ]
    return found


def rank_of(job: int, node: int) -> int:
    return next(pid for pid in descendants(agent_of(job, node)) if "mlet_dist" in command_line(pid))


@contextmanager
def launched(environment: dict[str, str], log: Path, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    command = torchx("run", "-s", "local_cwd", "-cfg", f"log_dir={log.parent / 'logs'}", *arguments)
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True) as job,
    ):
        try:
            yield job
        finally:
            for pid in [*descendants(job.pid), job.pid]:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def exit_code(job: "subprocess.Popen[str]", log: Path, seconds: float) -> int:
    """Return the exit code of ``job``; one that has not ended after ``seconds`` fails with what it has logged."""
    try:
        return job.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not ended after {seconds:.0f} s:\n{log.read_text()}") from None


def checkpoints(run: Path) -> list[Path]:
    """Return the manifests of complete checkpoints."""
    return list((run / "checkpoints").glob("*/manifest.json"))


def test_a_killed_rank_does_not_change_the_result(
    trained: TrainedRun, torchx_environment: dict[str, str], tmp_path: Path
) -> None:
    run, export, log = tmp_path / "run", tmp_path / "export", tmp_path / "log"
    settings = [each for each in trained.overrides if not each.startswith("data.path=")]
    job = [f"{COMPONENTS}:train", "--config", CONFIG, "--data", trained.data, "--run", run, "--export", export]
    job += ["-j", "2x1", "--wait", 60, "--max_restarts", 0]
    job += ["--", *settings, "train.checkpoint_every=3", "train.keep_last=1"]

    with launched(torchx_environment, log, *job) as torchx_run:
        deadline = time.monotonic() + 120
        while not checkpoints(run):
            assert time.monotonic() < deadline, log.read_text()
            assert torchx_run.poll() is None, log.read_text()
            time.sleep(0.01)
        os.kill(rank_of(torchx_run.pid, 1), signal.SIGKILL)
        assert exit_code(torchx_run, log, 180) == 1
    assert not (run / "summary.json").exists(), "the run finished before the rank was killed"
    output = log.read_text()
    assert "Job finished: FAILED" in output
    assert f"node 1 on {socket.gethostname()}: " in output
    assert f"rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL)" in output
    assert "Traceback" not in output

    with launched(torchx_environment, log, *job) as torchx_run:
        assert exit_code(torchx_run, log, 600) == 0, log.read_text()
    output = log.read_text()
    assert "resuming from" in output
    summary = last_json(output, "weights_sha256")
    assert summary["weights_sha256"] == trained.result["weights_sha256"]
    assert summary["first_step"] > 0
    assert last_json(output, "max_abs_logit_diff")["export"]["ok"]
    assert (export / "manifest.json").exists()
