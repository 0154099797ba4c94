"""Runs that are killed at random moments end as if they had not been: `make soak` kills more of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.command import ROOT, mlet_json
from tests.training.in_ranks import records

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
KILLS = int(os.environ.get("MLET_SOAK_KILLS", "4"))
WAYS = ("job", "rank", "saving", "SIGTERM")


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    """A run of some ten seconds that is always about to save."""
    return (
        *small_model,
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.02",
        "data.shuffle=true",
        "data.shuffle_buffer=640",
        "train.epochs=6",
        "train.max_steps=400",
        "train.checkpoint_every=7",
        "train.log_every=50",
    )


def children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [pid for pid in map(int, found) if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill(job: "subprocess.Popen[str]", way: str, run: Path, dice: random.Random) -> None:
    """Strike a job in one of these ways, at a random moment."""
    ranks = children(job.pid)
    if way == "saving":
        deadline = time.monotonic() + 5
        while job.poll() is None and time.monotonic() < deadline:
            if any((run / "checkpoints").glob("*/.incomplete")):
                break
    if way == "SIGTERM":
        job.terminate()
    elif way == "rank" and ranks:
        os.kill(dice.choice(ranks), signal.SIGKILL)
    else:
        job.kill()


def train(arguments: Sequence[str], run: Path, strike: str | None, dice: random.Random) -> int:
    """Run `mlet train`, struck soon after it began to train; its exit code."""
    command = [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *arguments, f"run.dir={run}"]
    command += ["--nproc", "2", "--json"]
    log = run.parent / "stderr"
    before = newest(run)
    with log.open("a") as stderr, subprocess.Popen(command, cwd=ROOT, stderr=stderr, text=True, stdout=stderr) as job:
        try:
            if strike is not None:
                while job.poll() is None and newest(run) == before:
                    time.sleep(0.01)
                time.sleep(dice.uniform(0, 0.8))
                kill(job, strike, run, dice)
            return job.wait(120)
        finally:
            job.kill()


def newest(run: Path) -> str:
    """The last checkpoint that is there, whole or not."""
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")


def test_random_kills_change_nothing(settings: tuple[str, ...], tmp_path: Path) -> None:
    seed = int(os.environ.get("MLET_SOAK_SEED", time.time_ns() % 2**32))
    print(f"MLET_SOAK_SEED={seed}")  # shown where the test fails
    dice = random.Random(seed)
    expected = mlet_json("train", CONFIG, *settings, f"run.dir={tmp_path / 'whole'}", "--nproc", 2)
    kills, runs = 0, 0
    while kills < KILLS:
        run = tmp_path / f"run {runs}"
        way = WAYS[kills % len(WAYS)]
        code = train(settings, run, way, dice)
        if code == 0:  # it was faster than the killer
            check(run, expected, tmp_path)
            runs += 1
            continue
        kills += 1
        assert code == {"SIGTERM": 75, "rank": 1}.get(way, -9), (way, (tmp_path / "stderr").read_text()[-2000:])
        assert not (run / "summary.json").exists()
    if (run / "config.yaml").exists() and not (run / "summary.json").exists():
        assert train(settings, run, None, dice) == 0, (tmp_path / "stderr").read_text()[-2000:]
        check(run, expected, tmp_path)


def check(run: Path, expected: dict[str, Any], folder: Path) -> None:
    """That a run ended with the same bits, and counted every row of the same steps once."""
    found = json.loads((run / "summary.json").read_text())
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert records(run) == records(folder / "whole")
    assert not list((run / "checkpoints").glob("*/.incomplete"))
