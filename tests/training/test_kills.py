"""Runs that lose a rank, a node or all ranks end as if uninterrupted; `make soak` kills more at random moments."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, TORCHRUN, ForkedCommand
from tests.helpers.mlet_command import mlet_json
from tests.helpers.train_in_ranks import records

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
KILLS = int(os.environ.get("MLET_SOAK_KILLS", "4"))
WAYS = ("job", "rank", "saving", "SIGTERM")


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings of a run of a few seconds that saves very often, and in which rows move in every step."""
    return (
        *small_model,
        "compression.policy=adaptive",
        "compression.budget=0.6",
        "compression.widths=[12,4]",
        "compression.interval=8",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.02",
        "data.shuffle=true",
        "data.shuffle_buffer=640",
        "train.epochs=6",
        "train.max_steps=160",
        "train.checkpoint_every=7",
        "train.log_every=50",
    )


@pytest.fixture(scope="module")
def whole(settings: tuple[str, ...], small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The run, uninterrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = mlet_json("train", CONFIG, *settings, f"run.dir={run}", "--nproc", 2)
    return TrainedRun(run, small_data, settings, result)


def children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [pid for pid in map(int, found) if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill(job: "subprocess.Popen[str]", method: str, run: Path, dice: random.Random) -> None:
    """Interrupt a job by one of these methods, at a random moment."""
    ranks = children(job.pid)
    if method == "saving":
        deadline = time.monotonic() + 5
        while job.poll() is None and time.monotonic() < deadline:
            if any((run / "checkpoints").glob("*/.incomplete")):
                break
    if method == "SIGTERM":
        job.terminate()
    elif method == "rank" and ranks:
        os.kill(dice.choice(ranks), signal.SIGKILL)
    else:
        job.kill()


def train(arguments: Sequence[str], run: Path, strike: str | None, dice: random.Random) -> int:
    """Run `mlet train`, interrupt it soon after training began, and return its exit code."""
    command = [*MLET, "train", CONFIG, *arguments, f"run.dir={run}", "--nproc", 2, "--json"]
    log = run.parent / "stderr"
    before = newest(run)
    with log.open("a") as output, ForkedCommand(command, stdout=output, stderr=output) as job:
        try:
            if strike is not None:
                while job.poll() is None and newest(run) <= before:
                    time.sleep(0.01)
                time.sleep(dice.uniform(0, 0.8))
                kill(job, strike, run, dice)
            return job.wait(120)
        finally:
            job.kill()


def newest(run: Path) -> str:
    """Return the last complete checkpoint."""
    return max((path.parent.name for path in (run / "checkpoints").glob("*/manifest.json")), default="")


def test_random_kills_change_nothing(settings: tuple[str, ...], whole: TrainedRun, tmp_path: Path) -> None:
    seed = int(os.environ.get("MLET_SOAK_SEED", time.time_ns() % 2**32))
    print(f"MLET_SOAK_SEED={seed}")  # shown where the test fails
    dice = random.Random(seed)
    kills, runs = 0, 0
    while kills < KILLS:
        run = tmp_path / f"run {runs}"
        method = WAYS[kills % len(WAYS)]
        code = train(settings, run, method, dice)
        if (run / "summary.json").exists():  # it was faster than the killer
            check(run, whole)
            runs += 1
            continue
        kills += 1
        assert code == {"SIGTERM": 75, "rank": 1}.get(method, -9), (method, (tmp_path / "stderr").read_text()[-2000:])
    if (run / "config.yaml").exists() and not (run / "summary.json").exists():
        assert train(settings, run, None, dice) == 0, (tmp_path / "stderr").read_text()[-2000:]
        check(run, whole)


def check(run: Path, whole: TrainedRun) -> None:
    """Check that a run ended with bitwise identical weights, and counted the rows of the same steps once each."""
    found = json.loads((run / "summary.json").read_text())
    assert found["test_logloss"] == whole.result["test_logloss"]
    assert found["weights_sha256"] == whole.result["weights_sha256"]
    assert records(run) == records(whole.path)
    assert not list((run / "checkpoints").glob("*/.incomplete"))


@contextmanager
def torchrun(run: Path, name: str, settings: Sequence[str], *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """Run an agent that trains, with its output in ``name`` beside the run; at the end of the block it is killed."""
    command = [*TORCHRUN, "--max-restarts", 3, *arguments, "-m", "mlet_dist", "train", CONFIG, *settings]
    command += [f"run.dir={run}", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        (run.parent / name).open("w") as log,
        ForkedCommand(command, env=environment, stdout=log, stderr=log) as agent,
    ):
        try:
            yield agent
        finally:
            ranks = children(agent.pid)
            agent.kill()
            agent.wait()
            deadline = time.monotonic() + 20
            while left := [pid for pid in ranks if Path(f"/proc/{pid}/cmdline").exists()]:
                if time.monotonic() > deadline:
                    for pid in left:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    raise AssertionError(f"ranks {left} outlive torchrun")
                time.sleep(0.05)


def wait_for_a_checkpoint(run: Path, *agents: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 90
    while not any((run / "checkpoints").glob("*/manifest.json")):
        assert time.monotonic() < deadline
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.05)


def test_torchrun_restarts_a_run_that_lost_a_rank(settings: tuple[str, ...], whole: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(run, "log", settings, "--standalone", "--nproc-per-node", "2") as agent:
        wait_for_a_checkpoint(run, agent)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(120) == 0, (tmp_path / "log").read_text()[-2000:]
    assert json.loads((run / "summary.json").read_text())["first_step"] > 0
    check(run, whole)


def test_torchrun_resumes_on_the_remaining_nodes(settings: tuple[str, ...], whole: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = "join_timeout=120,last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=6,is_host="
    nodes = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x")
    nodes += ("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf")
    with torchrun(run, "first", settings, *nodes, f"{how}1") as first:
        with torchrun(run, "second", settings, *nodes, f"{how}0") as second:
            wait_for_a_checkpoint(run, first, second)
        assert first.wait(120) == 0, (tmp_path / "first").read_text()[-2000:]
    found = json.loads((run / "summary.json").read_text())
    assert found["first_step"] > 0
    assert found["world_size"] == 1
    assert found["steps"] == whole.result["steps"]
    for after, before in zip(records(run), records(whole.path), strict=True):
        assert after.get("rows") == before.get("rows")
        assert after["step"] == before["step"]
        if "auc" in before:
            assert after["auc"] == pytest.approx(before["auc"], abs=1e-3)
