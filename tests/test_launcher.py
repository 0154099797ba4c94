"""How `mlet train --nproc` ends when it, or one of its ranks, is stopped from outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command import ROOT

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def training(small_model: tuple[str, ...], folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`mlet train --nproc 2` with hours of work, and its ranks' process ids, once they train."""
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *small_model, "--nproc", "2"]
    command += ["train.epochs=100000", "train.max_steps=null", f"run.dir={folder / 'run'}"]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as parent:
        ranks: list[int] = []
        try:
            metrics = folder / "run" / "metrics.jsonl"
            wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or parent.poll() is not None)
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            ranks = [pid for pid in map(int, children) if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(ranks) == 2
            yield parent, ranks
        finally:
            for pid in filter(alive, [parent.pid, *ranks]):
                os.kill(pid, signal.SIGKILL)


def said(parent: subprocess.Popen[str]) -> list[str]:
    """The lines of stderr that are neither the plan nor progress."""
    return [
        line for line in parent.communicate(timeout=40)[1].splitlines() if not re.match("plan |train |mlet: w", line)
    ]


def left_over(folder: Path) -> list[Path]:
    """Temporary directories, less the cache that torch keeps there."""
    return [path for path in (folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")]


def test_ranks_do_not_outlive_a_killed_parent(small_model: tuple[str, ...], tmp_path: Path) -> None:
    with training(small_model, tmp_path) as (parent, ranks):
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(alive, ranks)), 5)


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (
            signal.SIGTERM,
            75,
            r"mlet: SIGTERM: saved .*/checkpoints/step-\d{8}; the same command goes on from there",
        ),
        (
            signal.SIGUSR1,
            75,
            r"mlet: SIGUSR1: saved .*/checkpoints/step-\d{8}; the same command goes on from there",
        ),
        (signal.SIGINT, 130, "mlet: interrupted"),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT"],
)
def test_a_signal_ends_all_with_one_line(
    number: int, code: int, line: str, small_model: tuple[str, ...], tmp_path: Path
) -> None:
    with training(small_model, tmp_path) as (parent, ranks):
        parent.send_signal(number)
        (found,) = said(parent)
        assert re.fullmatch(line, found)
        assert parent.returncode == code
        assert not any(map(alive, ranks))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("ranks", [(), ("--nproc", "2")], ids=["alone", "with ranks"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_training_asks_for_a_restart_too(
    name: str, ranks: tuple[str, ...], small_model: tuple[str, ...], tmp_path: Path
) -> None:
    """As soon as torch is being read."""
    command = [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *small_model, *ranks]
    with subprocess.Popen(
        [*command, f"run.dir={tmp_path / 'run'}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as job:
        wait_until(lambda: "libtorch" in Path(f"/proc/{job.pid}/maps").read_text() or job.poll() is not None)
        job.send_signal(signal.Signals[name])
        assert said(job) == [f"mlet: {name}: stopped before anything was saved; start the same command again"]
    assert job.returncode == 75


def test_a_killed_rank_is_one_line(small_model: tuple[str, ...], tmp_path: Path) -> None:
    with training(small_model, tmp_path) as (parent, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        (line,) = said(parent)
        assert re.match(r"mlet: error: rank 1 was killed by signal 9 \(SIGKILL\)", line)
        assert parent.returncode == 1
        assert not any(map(alive, ranks))
    assert left_over(tmp_path) == []


def test_a_mistake_that_the_ranks_find_is_one_line(small_model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *small_model, "--nproc", "2"]
    command += ["optimizer.learning_rate=1e20", f"run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as parent:
        (line,) = said(parent)
    assert line.startswith("mlet: error: the training loss of step ")
    assert parent.returncode == 2
    assert left_over(tmp_path) == []


def test_sigterm_leaves_no_temporary_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlet_dist", "synth", "--out", str(tmp_path / "data"), "--rows", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as synth:
        wait_until(lambda: list(tmp_path.iterdir()) or synth.poll() is not None)
        synth.terminate()
        assert synth.communicate(timeout=40)[1].splitlines()[-1] == "mlet: terminated"
    assert synth.returncode == 143
    assert not list(tmp_path.iterdir())
