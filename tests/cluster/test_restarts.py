"""Nodes whose ranks fail start them again in place, and the run ends with the bits of an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.test_wrong_launch import free_port
from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.mlet_command import mlet_json
from tests.training.test_kills import children

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


class Job:
    """Nodes of one rank each on this host, which train the run of ``trained`` again and save every few steps."""

    def __init__(self, trained: TrainedRun, folder: Path, count: int, *options: object) -> None:
        self.run, self.folder, self.count = folder / "run", folder, count
        self.nodes: dict[int, subprocess.Popen[str]] = {}
        command = [*MLET, "train", CONFIG, *trained.overrides, f"run.dir={self.run}", "train.checkpoint_every=2"]
        command += ["--nproc", 1, "--nnodes", count, "--master-addr", "localhost", "--master-port", free_port()]
        self._command = [*command, "--json", *options]

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            with (self.folder / f"out-{rank}").open("a") as out, (self.folder / f"err-{rank}").open("a") as err:
                self.nodes[rank] = ForkedCommand([*self._command, "--node-rank", rank], stdout=out, stderr=err)

    def log(self, rank: int) -> str:
        return (self.folder / f"err-{rank}").read_text()

    def wait_until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            assert any(node.poll() is None for node in self.nodes.values())
            time.sleep(0.02)

    def checkpoints(self) -> set[str]:
        return {path.parent.name for path in (self.run / "checkpoints").glob("*/manifest.json")}

    def wait_for_a_checkpoint(self) -> None:
        """Wait until the run has saved a checkpoint later than all that there are now."""
        before = max(self.checkpoints(), default="")
        self.wait_until(lambda: max(self.checkpoints(), default="") > before)

    def rank_of(self, node: int) -> int:
        (found,) = children(self.nodes[node].pid)
        return found

    def kill_rank(self, node: int) -> None:
        os.kill(self.rank_of(node), signal.SIGKILL)

    def kill_node(self, node: int) -> None:
        """Kill a node at once, as if its pod were deleted without a grace period."""
        self.nodes[node].kill()
        self.nodes[node].wait()

    def send(self, node: int, number: int) -> None:
        """Send a signal to all processes of a node."""
        for pid in (*children(self.nodes[node].pid), self.nodes[node].pid):
            os.kill(pid, number)

    def codes(self, seconds: float = 120) -> list[int]:
        deadline = time.monotonic() + seconds
        return [self.nodes[rank].wait(deadline - time.monotonic()) for rank in sorted(self.nodes)]

    def result(self) -> dict[str, object]:
        result: dict[str, object] = json.loads((self.folder / "out-0").read_text().splitlines()[-1])
        return result


@contextmanager
def job(trained: TrainedRun, folder: Path, count: int, *options: object) -> Iterator[Job]:
    """Start the nodes of a job, which are killed at the end of the block."""
    found = Job(trained, folder, count, *options)
    try:
        found.start(*range(count))
        yield found
    finally:
        for rank, node in found.nodes.items():
            for pid in (*children(node.pid), node.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()
            print(f"node {rank}:\n{found.log(rank)}")


def reasons(log: str) -> list[str]:
    """Return why the ranks have failed, according to the log of a node."""
    return re.findall(r"the ranks have failed: (.*); they start again when all nodes have met", log)


def test_killed_ranks_are_restarted_in_place(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, "--max-restarts", 1) as nodes:
        for victim in (1, 0, 1):
            nodes.wait_for_a_checkpoint()
            nodes.kill_rank(victim)
        assert nodes.codes() == [0, 0]
        logs = [nodes.log(rank) for rank in (0, 1)]
    assert nodes.result()["weights_sha256"] == trained.result["weights_sha256"]
    assert nodes.result()["first_step"] > 0
    for log in logs:
        assert [re.match(r"node (\d) on ", reason)[1] for reason in reasons(log)] == ["1", "0", "1"]
        assert "Traceback" not in log
    times = r"mlet: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ node 1 of 2: "
    for text in ("started; joins at ", "all 2 nodes have joined; restart 3", "resuming from ", "ended: its ranks have"):
        assert re.search(times + text, logs[1])


def test_a_replaced_node_and_one_that_vanishes(trained: TrainedRun, tmp_path: Path) -> None:
    """Three nodes: 1 is killed and started again; then 2 stops to answer, is killed and started again; then 0."""
    settings = [each for each in trained.overrides if not each.startswith("data.batch_size=")] + ["data.batch_size=66"]
    whole = mlet_json("train", CONFIG, *settings, f"run.dir={tmp_path / 'whole'}", "--nproc", 3)
    with job(trained, tmp_path, 3, "--max-restarts", 1, "data.batch_size=66") as nodes:
        nodes.wait_for_a_checkpoint()
        nodes.kill_node(1)
        nodes.start(1)
        nodes.wait_for_a_checkpoint()
        nodes.send(2, signal.SIGSTOP)
        stopped = time.monotonic()
        nodes.wait_until(lambda: len(reasons(nodes.log(0))) == 2, 30)
        assert time.monotonic() - stopped < 25
        assert "node 2 on" in reasons(nodes.log(0))[1]
        nodes.send(2, signal.SIGKILL)
        nodes.nodes[2].wait()
        nodes.start(2)
        nodes.wait_for_a_checkpoint()
        nodes.kill_node(0)
        nodes.start(0)
        assert nodes.codes(180) == [0, 0, 0]
    assert nodes.result()["weights_sha256"] == whole["weights_sha256"]
    assert nodes.result()["first_step"] > 0
