"""`torchx run -s local_cwd` with two nodes, killed twice: the weights are bitwise those of a run without failures."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
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


def checkpoints(run: Path) -> int:
    """Return the step of the latest complete checkpoint; 0 if there is none."""
    found = (run / "checkpoints").glob("*/manifest.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def test_a_killed_rank_and_a_killed_agent_do_not_change_the_result(
    trained: TrainedRun, torchx_environment: dict[str, str], tmp_path: Path
) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    settings = [each for each in trained.overrides if not each.startswith("data.path=")]
    job = [f"{COMPONENTS}:train", "--config", CONFIG, "--data", trained.data, "--run", run, "--export", export]
    job += ["-j", "2x1", "--wait", 60, "--", *settings, "train.checkpoint_every=3", "train.keep_last=1"]

    def kill_one(victim: Callable[[int, int], int], name: str) -> str:
        before, log = checkpoints(run), tmp_path / name
        with launched(torchx_environment, log, *job) as torchx_run:
            deadline = time.monotonic() + 120
            while checkpoints(run) <= before:
                assert time.monotonic() < deadline, log.read_text()
                assert torchx_run.poll() is None, log.read_text()
                time.sleep(0.01)
            os.kill(victim(torchx_run.pid, 1), signal.SIGKILL)
            assert torchx_run.wait(60) == 1
        assert not (run / "summary.json").exists(), "the run finished before the process was killed"
        output = log.read_text()
        assert "Job finished: FAILED" in output
        assert "another rank has ended; see that rank's error for the reason" in output
        assert "Traceback" not in output
        return output

    assert f"rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL)" in kill_one(rank_of, "worker")
    kill_one(agent_of, "agent")
    with launched(torchx_environment, tmp_path / "last", *job) as torchx_run:
        assert torchx_run.wait(180) == 0, (tmp_path / "last").read_text()
    output = (tmp_path / "last").read_text()
    assert "resuming from" in output
    summary = last_json(output, "weights_sha256")
    assert summary["weights_sha256"] == trained.result["weights_sha256"]
    assert summary["first_step"] > 0
    assert last_json(output, "max_abs_logit_diff")["export"]["ok"]
    assert (export / "manifest.json").exists()
