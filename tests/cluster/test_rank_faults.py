"""A rank is stopped, aborted or killed while all others are held in C, where neither gloo nor Python can end them.

Every node ends within seconds of the verdict of a launcher, with the exit code that schedulers act on, and names the
rank and its host. `make soak` repeats each fault ten times, on one node and on two, with two ranks and with four.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlet_dist.cluster.rank_watch import STOPPED_SECONDS
from tests.cluster.test_wrong_launch import free_port
from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.held_ranks import HOLD, hold
from tests.training.test_kills import children

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
HOST = socket.gethostname()
HANG = 150  # far beyond what any fault takes: tests do not time anything
ROUNDS = int(os.environ.get("MLET_SOAK_FAULTS", "0"))
LAYOUTS = [(1, 2), (1, 4), (2, 1), (2, 2)]
FAULTS = {"stop": signal.SIGSTOP, "abort": signal.SIGABRT, "kill": signal.SIGKILL}
CASES = [(fault, *layout) for fault in FAULTS for layout in LAYOUTS]
SHORT = [("stop", 1, 4), ("stop", 2, 2), ("abort", 1, 2), ("abort", 2, 1), ("kill", 1, 4), ("kill", 2, 1)]


class Job:
    """The nodes of a job on this host, each with ranks that train for hours."""

    def __init__(self, trained: TrainedRun, folder: Path, count: int, nproc: int, *options: object) -> None:
        self.run, self.folder, self.count, self.nproc = folder / "run", folder, count, nproc
        self.held = folder / "held"
        self.held.mkdir()
        command = [*MLET, "train", CONFIG, *trained.overrides, f"run.dir={self.run}", "--nproc", nproc]
        command += ["train.max_steps=null", "train.epochs=100000", *options]
        if count > 1:
            command += ["--nnodes", count, "--master-addr", "localhost", "--master-port", free_port(), "--node-rank"]
        self.nodes: list[subprocess.Popen[str]] = []
        for rank in range(count):
            with (folder / f"err-{rank}").open("w") as log:
                given = [*command, *([rank] if count > 1 else [])]
                self.nodes.append(ForkedCommand(given, stderr=log, env=os.environ | {HOLD: str(self.held)}))

    def pids(self) -> list[int]:
        """Return the process ids of all ranks, in order."""
        return [pid for node in self.nodes for pid in sorted(children(node.pid))]

    def log(self, node: int) -> str:
        return (self.folder / f"err-{node}").read_text()

    def wait_until_it_trains(self) -> None:
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + HANG
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            assert all(node.poll() is None for node in self.nodes)
            time.sleep(0.02)

    def hold_all_but(self, rank: int) -> None:
        hold(self.held, [each for each in range(self.count * self.nproc) if each != rank])

    def codes(self) -> list[int]:
        deadline = time.monotonic() + HANG
        return [node.wait(deadline - time.monotonic()) for node in self.nodes]


@contextmanager
def job(trained: TrainedRun, folder: Path, count: int, nproc: int, *options: object) -> Iterator[Job]:
    """Start a job, whose processes are killed at the end of the block."""
    found = Job(trained, folder, count, nproc, *options)
    try:
        yield found
    finally:
        for number, node in enumerate(found.nodes):
            for pid in (*children(node.pid), node.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()
            print(f"node {number}:\n{found.log(number)}")


@pytest.mark.parametrize("attempt", range(max(1, ROUNDS)))
@pytest.mark.parametrize(("fault", "count", "nproc"), CASES if ROUNDS else SHORT)
def test_every_node_ends_and_names_the_rank(
    trained: TrainedRun, tmp_path: Path, fault: str, count: int, nproc: int, attempt: int
) -> None:
    victim = attempt % (count * nproc) if ROUNDS else count * nproc - 1
    with job(trained, tmp_path, count, nproc) as nodes:
        nodes.wait_until_it_trains()
        pids = nodes.pids()
        nodes.hold_all_but(victim)
        started = time.monotonic()
        os.kill(pids[victim], FAULTS[fault])
        codes = nodes.codes()
        print(f"fault={fault} nodes={count} nproc={nproc} victim={victim} seconds={time.monotonic() - started:.1f}")
        assert codes == [1 if node == victim // nproc else 75 for node in range(count)]
        logs = [nodes.log(node) for node in range(count)]
    for log in logs:
        (line,) = (each for each in log.splitlines() if each.startswith("mlet: error: "))
        assert re.search(rf"\brank {victim}\b", line)
        assert HOST in line


def test_survivors_of_a_vanished_machine_end_wherever_they_wait(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, 1) as nodes:
        nodes.wait_until_it_trains()
        nodes.hold_all_but(1)
        for pid in (nodes.pids()[1], nodes.nodes[1].pid):
            os.kill(pid, signal.SIGSTOP)
        assert nodes.nodes[0].wait(HANG) == 75
        assert nodes.log(0).splitlines()[-1] == (
            f"mlet: error: node 1 on {HOST} is lost: it has given no sign of life for 15 s"
        )


def test_a_job_that_is_suspended_as_a_whole_goes_on(trained: TrainedRun, tmp_path: Path) -> None:
    """As by a batch system, or with a laptop; the launcher continues before its ranks."""
    with job(trained, tmp_path, 1, 2) as nodes:
        nodes.wait_until_it_trains()
        pids = [*nodes.pids(), nodes.nodes[0].pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS + 2)
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
            time.sleep(1)
        metrics = nodes.run / "metrics.jsonl"
        before, deadline = metrics.stat().st_size, time.monotonic() + HANG
        while metrics.stat().st_size == before:
            assert time.monotonic() < deadline
            assert nodes.nodes[0].poll() is None
            time.sleep(0.02)


def test_a_job_that_is_asked_to_stop_ends_though_a_rank_is_stopped(trained: TrainedRun, tmp_path: Path) -> None:
    """The ranks cannot save without it, and their launchers would wait for ten minutes."""
    with job(trained, tmp_path, 2, 1) as nodes:
        nodes.wait_until_it_trains()
        pids = nodes.pids()
        nodes.hold_all_but(1)
        os.kill(pids[1], signal.SIGSTOP)
        for node in nodes.nodes:
            node.terminate()
        assert nodes.codes() == [75, 75]
        for node in (0, 1):
            assert nodes.log(node).splitlines()[-1].startswith("mlet: SIGTERM: stopped without saving; run the same")


def test_torch_elastic_restarts_the_ranks_of_an_elastic_job(trained: TrainedRun, tmp_path: Path) -> None:
    options = ["--nnodes", "1:2", "--node-rank", 0, "--master-addr", "localhost", "--master-port", free_port()]
    with job(trained, tmp_path, 1, 2, *options, "--wait", 2) as nodes:
        nodes.wait_until_it_trains()
        before, deadline = nodes.pids(), time.monotonic() + HANG
        os.kill(before[1], signal.SIGSTOP)
        while len(nodes.pids()) < 2 or set(nodes.pids()) & set(before):
            assert time.monotonic() < deadline
            assert nodes.nodes[0].poll() is None
            time.sleep(0.1)
