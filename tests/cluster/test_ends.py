"""How the nodes of a job end if one of them receives a signal or dies: schedulers act on the exit codes."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.mlet_command import error_line, mlet_json
from tests.launch.test_local import checkpoints
from tests.training.test_kills import children

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@contextmanager
def two_nodes(settings: list[str]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start both nodes of a job, which differ in --node-rank only; yield them after the job has saved a checkpoint."""
    command = [*MLET, "train", CONFIG, *settings, "--nproc", 1, "--nnodes", 2]
    command += ["--master-addr", "localhost", "--once", "--node-rank"]
    run = Path(next(each for each in settings if each.startswith("run.dir=")).partition("=")[2])
    before = checkpoints(run)
    nodes = [ForkedCommand([*command, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while checkpoints(run) <= before:
            assert time.monotonic() < deadline
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.02)
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            print(node.communicate())


def last_line(node: "subprocess.Popen[str]") -> str:
    return node.communicate(timeout=60)[1].splitlines()[-1]


def test_exit_codes_tell_schedulers_what_to_do(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*trained.overrides, f"run.dir={run}", "train.checkpoint_every=5"]
    endless = [*settings, "train.max_steps=null", "train.epochs=100000"]
    with two_nodes(endless) as nodes:  # evicted: all ranks save, and the scheduler starts them again
        nodes[1].send_signal(signal.SIGTERM)
        lines = [last_line(node) for node in nodes]
        assert [node.returncode for node in nodes] == [75, 75]
        assert lines[0] == lines[1]
        assert re.fullmatch(r"mlet: SIGTERM: saved \S+; run the same command again to resume from it", lines[0])
    with two_nodes(endless) as nodes:  # a rank crashes: the other node names it
        os.kill(children(nodes[1].pid)[0], signal.SIGKILL)
        lines = [last_line(node) for node in nodes]
        assert [node.returncode for node in nodes] == [75, 1]
        assert f"node 1 on {socket.gethostname()}: " in lines[0]
    with two_nodes(endless) as nodes:  # a machine is gone: the other node is started again
        os.kill(nodes[1].pid, signal.SIGKILL)
        assert "another rank has ended" in last_line(nodes[0])
        assert nodes[0].wait() == 75


def test_once_accepts_this_finished_run_and_no_other(trained: TrainedRun) -> None:
    """No rank is started: a pod that is started again after the job has finished must succeed."""
    given = [*trained.overrides, f"run.dir={trained.path}"]
    result = mlet_json("train", CONFIG, *given, "--once", "--nproc", 1, "--nnodes", 2, "--node-rank", 1,
                       "--master-addr", "localhost")  # fmt: skip
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    assert "holds a finished run; choose another" in error_line("train", CONFIG, *given)
    with_other_settings = error_line("train", CONFIG, *given, "train.seed=9", "--once")
    assert "holds a run that finished with other settings: train.seed was 0, is 9; change them" in with_other_settings
