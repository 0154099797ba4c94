"""Faults around a run: a full disk, and a rank that hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.held_ranks import HOLD, hold
from tests.helpers.mlet_command import mlet_json
from tests.training.test_kills import children

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("failure", ["stop", "continue"])
def test_a_full_disk_keeps_the_older_checkpoint_and_reports_the_missing_bytes(
    small_model: tuple[str, ...], tmp_path: Path, failure: str
) -> None:
    """A file system of 2 MB in a mount namespace of our own: the first checkpoint fits, the second does not."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    arguments = [
        *small_model,
        f"run.dir={tmp_path / 'run'}",
        f"train.checkpoint_dir={disk}",
        "train.checkpoint_every=20",
    ]
    arguments += [f"train.checkpoint_failure={failure}"]
    script = 'mount -t tmpfs -o size=2m disk "$0" && kept=$1 && shift && "$@"; code=$?; cp -r "$0" "$kept"; exit $code'
    command = ["unshare", "-rm", "sh", "-c", script, str(disk), str(kept)]
    command += [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("mlet: error: ")]
    assert len(errors) == 1
    found = re.search(r"needs ([\d,]+) bytes and ([\d,]+) are free: ([\d,]+) bytes are missing", errors[0])
    assert found is not None, errors[0]
    needed, free, missing = (int(number.replace(",", "")) for number in found.groups())
    assert missing == needed - free > 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("mlet: warning: ")]
    assert len(warnings) == (1 if failure == "continue" else 0)
    assert "step-00000057" in errors[0] if failure == "continue" else "step-00000040" in errors[0]
    assert [path.name for path in kept.glob("step-*")] == ["step-00000020"]
    again = tmp_path / "again"
    result = mlet_json("train", CONFIG, *small_model, f"run.dir={again}", f"train.resume={kept}")
    assert (result["first_step"], result["steps"]) == (20, 57)


def test_a_rank_that_hangs_is_named_within_the_timeout_and_killed(small_model: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*MLET, "train", CONFIG, *small_model, f"run.dir={run}", "--nproc", 2]
    command += ["train.epochs=100000", "train.max_steps=null", "train.collective_timeout_s=5"]
    # With groups that TorchRec makes for itself.
    command += ["sharding.sharding_types=[table_row_wise,data_parallel]", "sharding.data_parallel_up_to_mb=0"]
    with ForkedCommand(command, stderr=subprocess.PIPE, env=os.environ | {HOLD: str(tmp_path)}) as job:
        ranks: list[int] = []
        try:
            wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
            ranks = children(job.pid)
            hold(tmp_path, [1])
            lines = job.communicate(timeout=120)[1].splitlines()
        finally:
            for pid in (job.pid, *ranks):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
    errors = [line for line in lines if line.startswith("mlet: error: ")]
    assert errors == [
        f"mlet: error: rank 1 on {socket.gethostname()} took no part in a collective for 5 s "
        "(train.collective_timeout_s): it hangs or has ended; the other ranks stop"
    ]
    assert job.returncode == 1
