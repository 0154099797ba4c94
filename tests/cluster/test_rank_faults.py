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
