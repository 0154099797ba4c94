"""Nodes whose ranks fail start them again in place, and the run ends with the bits of an undisturbed one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from mlet_dist.cluster.failure import Failure
from mlet_dist.cluster.launcher import _Node
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.restarts import RestartLimit, Supervisor
from mlet_dist.cluster.stop_request import StopRequest
from mlet_dist.config.config_file import load_config
from mlet_dist.errors import Interrupted, NodesMissing
from mlet_dist.training.attempts import mark_attempt
from tests.cluster.test_wrong_launch import free_port
from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.held_ranks import HOLD, hold
from tests.helpers.mlet_command import error_line, mlet_json
from tests.training.test_kills import children

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


class Job:
    """Nodes of one rank each on this host, which train the run of ``trained`` again and save every few steps."""

    def __init__(self, trained: TrainedRun, folder: Path, count: int, *options: object) -> None:
        self.run, self.folder, self.count = folder / "run", folder, count
        self.nodes: dict[int, subprocess.Popen[str]] = {}
        command = [*MLET, "train", CONFIG, *trained.overrides, f"run.dir={self.run}", "train.checkpoint_every=6"]
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


@pytest.mark.parametrize("evicted", [0, 1])
def test_a_node_that_is_asked_to_stop_alone_is_waited_for(trained: TrainedRun, tmp_path: Path, evicted: int) -> None:
    """All ranks save, but only the command of the node that received the signal ends."""
    with job(trained, tmp_path, 2, "--max-restarts", 1) as nodes:
        nodes.wait_for_a_checkpoint()
        nodes.nodes[evicted].terminate()
        assert nodes.nodes[evicted].wait(60) == 75
        nodes.start(evicted)
        assert nodes.codes() == [0, 0]
        assert "stopped with those of another node; they start again when all nodes have met" in nodes.log(1 - evicted)
        assert not reasons(nodes.log(1 - evicted))
    assert nodes.result()["weights_sha256"] == trained.result["weights_sha256"]
    assert nodes.result()["first_step"] > 0


def test_a_signal_to_a_rank_alone_ends_all_nodes(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, "--max-restarts", 1) as nodes:
        nodes.wait_for_a_checkpoint()
        os.kill(nodes.rank_of(1), signal.SIGTERM)
        assert nodes.codes(90) == [75, 75]


class ToldBefore:
    """Heartbeats of a node that is told of a failure of node 1, and keeps what it tells itself."""

    def __init__(self, told: Failure | None) -> None:
        self._told = told
        self.left: list[Failure] = []

    def wait_for_failure(self, seconds: float) -> Failure | None:
        return self._told

    def leave_with(self, failure: Failure, *, for_good: bool) -> None:
        self.left.append(failure)


def test_a_node_that_is_late_knows_a_signal_to_a_rank_from_one_to_a_node() -> None:
    def after(told: Failure | None, *received: int) -> tuple[str | None, Failure]:
        stop, heartbeats = StopRequest(), ToldBefore(told)
        stop.received.extend(received)
        limit = RestartLimit(1, lambda: 0)
        supervisor = Supervisor(1, [], Nodes(2, 2, 0, "localhost", 1, 1), "job", stop, limit, bool, bool)
        try:
            found = supervisor._after(Interrupted("saved"), mock.Mock(), heartbeats, "node 0")  # type: ignore[arg-type]
        except Interrupted:
            found = None
        (left,) = heartbeats.left
        return found, left

    again, left = after(Failure("stopped", 1, "node 1 was asked to stop by a signal"))
    assert (again, left.kind) == ("stopped", "stopped")
    ended, left = after(None)
    assert (ended, left.kind) == (None, "rank_stopped")
    assert after(left := Failure("rank_stopped", 1, left.text)) == (None, Failure("rank_stopped", 0, left.text))
    ended, left = after(None, signal.SIGTERM)
    assert (ended, left) == (None, Failure("stopped", 0, "node 0 was asked to stop by a signal"))


def test_nodes_that_are_all_asked_to_stop_end(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, "--max-restarts", 1) as nodes:
        nodes.wait_for_a_checkpoint()
        nodes.nodes[0].terminate()
        time.sleep(1)
        nodes.nodes[1].terminate()
        assert nodes.codes(60) == [75, 75]


@pytest.mark.parametrize("vanished", [0, 1])
def test_a_vanished_machine_is_found_in_seconds(trained: TrainedRun, tmp_path: Path, vanished: int) -> None:
    """Its connections stay open, and the collective would time out after ten minutes."""
    with job(trained, tmp_path, 2, "train.max_steps=null", "train.epochs=100000") as nodes:
        nodes.wait_for_a_checkpoint()
        nodes.send(vanished, signal.SIGSTOP)
        stopped = time.monotonic()
        assert nodes.nodes[1 - vanished].wait(60) == 75
        assert time.monotonic() - stopped < 30
        assert nodes.log(1 - vanished).splitlines()[-1] == (
            f"mlet: error: node {vanished} on {socket.gethostname()} is lost: it has given no sign of life for 15 s"
        )


def test_a_node_that_crashes_too_often_ends_and_can_be_replaced(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, "--max-restarts", 1, "train.checkpoint_every=40") as nodes:
        for number in range(2):
            nodes.wait_until(lambda: f"all 2 nodes have joined{'; restart 1' * number}" in nodes.log(1))  # noqa: B023
            nodes.wait_until(lambda: children(nodes.nodes[1].pid))
            nodes.kill_rank(1)
            nodes.wait_until(lambda: len(reasons(nodes.log(0))) == number + 1)  # noqa: B023
        assert nodes.nodes[1].wait(60) == 1
        assert nodes.log(1).splitlines()[-1] == (
            f"mlet: error: rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL); it may have run out of "
            "memory, see `dmesg`; restarted 1 time (--max-restarts) without a new checkpoint in between"
        )
        nodes.start(1)
        assert nodes.codes() == [0, 0]
    assert nodes.result()["weights_sha256"] == trained.result["weights_sha256"]


def test_an_input_error_after_a_restart_ends_all_nodes(trained: TrainedRun, tmp_path: Path) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    with job(trained, tmp_path, 2, "--max-restarts", 3, f"data.path={data}") as nodes:
        nodes.wait_for_a_checkpoint()
        data.rename(tmp_path / "unmounted")
        nodes.kill_rank(1)
        assert nodes.codes(40) == [2, 2]
        for rank in (0, 1):
            assert f"{data}: no such data set" in nodes.log(rank).splitlines()[-1]


def test_a_rank_that_hangs_on_another_node_is_killed_and_restarted(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOLD, str(tmp_path))
    with job(trained, tmp_path, 2, "--max-restarts", 1, "train.collective_timeout_s=15") as nodes:
        nodes.wait_for_a_checkpoint()
        hold(tmp_path, [1], once=True)
        assert nodes.codes() == [0, 0]
        for rank in (0, 1):
            (reason,) = reasons(nodes.log(rank))
            assert f"rank 1 on {socket.gethostname()} took no part in a collective for 15 s" in reason
    assert nodes.result()["weights_sha256"] == trained.result["weights_sha256"]


def test_only_the_node_of_a_stopped_rank_counts_it(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is held in C each time, so that its launcher has to kill it; one more restart would end node 1."""
    monkeypatch.setenv(HOLD, str(tmp_path))
    with job(trained, tmp_path, 2, "--max-restarts", 1) as nodes:
        nodes.wait_for_a_checkpoint()
        hold(tmp_path, [0], once=True)
        os.kill(nodes.rank_of(1), signal.SIGSTOP)
        nodes.wait_until(lambda: "all 2 nodes have joined; restart 1" in nodes.log(0))
        nodes.wait_until(lambda: children(nodes.nodes[0].pid))
        nodes.kill_rank(0)
        assert nodes.codes() == [0, 0]
        for rank in (0, 1):
            stopped, killed = reasons(nodes.log(rank))
            assert re.match(r"node 1 on \S+: rank 1( on \S+)? was stopped \(SIGSTOP\) for 15 s, and killed", stopped)
            assert killed.startswith("node 0 on ")
    assert nodes.result()["weights_sha256"] == trained.result["weights_sha256"]


def test_a_node_that_waits_for_the_others_can_be_stopped(trained: TrainedRun, tmp_path: Path) -> None:
    with job(trained, tmp_path, 2, "--max-restarts", 3, "--wait", 300) as nodes:
        nodes.wait_for_a_checkpoint()
        for waiting in (0, 1):
            nodes.kill_node(1 - waiting)
            nodes.wait_until(lambda: len(reasons(nodes.log(waiting))) == 1)  # noqa: B023
            time.sleep(0.5)
            nodes.nodes[waiting].terminate()
            assert nodes.nodes[waiting].wait(20) == 75
            assert nodes.log(waiting).splitlines()[-1].startswith("mlet: SIGTERM: stopped without saving; run the same")
            (tmp_path / f"err-{waiting}").write_text("")
            if waiting == 0:
                nodes.start(0, 1)
                nodes.wait_for_a_checkpoint()


def test_the_ranks_of_one_machine_are_restarted(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*MLET, "train", CONFIG, *trained.overrides, f"run.dir={run}", "train.checkpoint_every=2"]
    command += ["--nproc", 2, "--max-restarts", 1, "--json"]
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list((run / "checkpoints").glob("*/manifest.json")):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line for line in errors.splitlines() if "the ranks have failed" in line] == [
        f"mlet: the ranks have failed: rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL); it "
        "may have run out of memory, see `dmesg`; they start again now"
    ]
    result = json.loads(output.splitlines()[-1])
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    assert result["first_step"] > 0


def test_a_crash_before_the_earlier_run_is_replaced(trained: TrainedRun, tmp_path: Path) -> None:
    """Its result is not that of the job that is to replace it."""
    run = shutil.copytree(trained.path, tmp_path / "run")
    before = (run / "config.yaml").read_text()
    command = [*MLET, "train", CONFIG, *trained.overrides, f"run.dir={run}", "run.overwrite=true"]
    command += ["--nproc", 2, "--max-restarts", 1, "--json"]
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(children(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "they start again now" in errors
    assert (run / "config.yaml").read_text() != before
    result = json.loads(output.splitlines()[-1])
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    assert result["first_step"] == 0


def test_a_node_that_fails_after_the_end_of_the_run_needs_no_other_node(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of the other nodes may have succeeded, and these nodes have ended."""
    for name in ("MLET_ATTEMPT", "MLET_RUN_NOT_REPLACED"):
        monkeypatch.setenv(name, "")
    config = load_config(CONFIG, [*trained.overrides, f"run.dir={trained.path}"])
    nodes = Nodes(min_count=2, count=2, rank=1, master="localhost", port=free_port(), wait=1)
    with StopRequest() as stop:
        node = _Node(1, nodes, "job", lambda: config, stop)
        mark_attempt(0)
        with pytest.raises(NodesMissing):
            node.meet(0, "new")
        mark_attempt(1)
        assert node.meet(1, "fault") is None
        mark_attempt(1, has_replaced=False)
        with pytest.raises(NodesMissing):
            node.meet(1, "fault")


def test_checkpoints_of_a_run_that_is_to_be_replaced_are_no_progress(trained: TrainedRun) -> None:
    def latest_step(*settings: str) -> int:
        config = load_config(CONFIG, [*trained.overrides, f"run.dir={trained.path}", *settings])
        node = _Node(1, None, "job", lambda: config, StopRequest())
        node.check()
        return node.latest_step()

    assert latest_step() == trained.result["steps"]
    assert latest_step("run.overwrite=true") == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-restarts", 1), "--max-restarts needs --nproc, the number of ranks on each node; torchrun has its own"),
        (("--max-restarts", -1, "--nproc", 2), "'-1' is not a whole number of at least 1"),
        (
            ("--max-restarts", 1, "--nproc", 2, "--nnodes", "1:2", "--node-rank", 0, "--master-addr", "a"),
            "--max-restarts needs a fixed number of nodes, and --nnodes is 1:2",
        ),
    ],
)
def test_options_that_restarts_need(options: tuple[object, ...], message: str) -> None:
    assert message in error_line("train", CONFIG, *options)
