"""What the machine refuses, and signals that come early, are one line: no traceback, no wait."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlet_dist.errors import UserError, refusal
from tests.helpers.mlet_command import ROOT, error_line, mlet

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
MLET = [sys.executable, "-m", "mlet_dist"]


@pytest.mark.parametrize("disk", ["size=12k", "size=20k", "size=16m,nr_inodes=4"])
def test_a_full_disk_under_the_run_directory(disk: str, small_model: tuple[str, ...], tmp_path: Path) -> None:
    """In a mount namespace of our own: no room for the plan, no room for TensorBoard's records, no inodes."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o "$0" disk "$1" && shift && exec "$@"'
    arguments = [*small_model, f"run.dir={tmp_path}/disk/run", f"train.checkpoint_dir={tmp_path}/kept"]
    command = ["unshare", "-rm", "sh", "-c", script, disk, str(tmp_path / "disk"), *MLET, "train", str(CONFIG)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mlet: error: ")]
    assert line.startswith(f"mlet: error: run.dir {tmp_path}/disk/run")
    assert line.endswith("cannot be written: No space left on device")


def test_a_result_that_stdout_cannot_take(tmp_path: Path) -> None:
    command = [*MLET, "synth", "--out", str(tmp_path / "data"), "--rows", "20"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "mlet: error: the result cannot be written to stdout: No space left on device"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_python_imports(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """The process signals itself at the first import after its handlers stand."""
    program = (
        "import os, sys, mlet_dist.__main__ as entry\n"
        "class Early:\n"
        "    def find_spec(self, name, *_):\n"
        f"        os.kill(os.getpid(), {int(number)}) if name == 'mlet_dist.cli' else None\n"
        "sys.meta_path.insert(0, Early())\n"
        "sys.exit(entry.main())\n"
    )
    command = [sys.executable, "-c", program, "train", str(CONFIG), f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlet: {'interrupted' if number == signal.SIGINT else number.name}")
    assert line.endswith("run the command again" if number == signal.SIGINT else "run the same command again")
    assert not (tmp_path / "run").exists()


def test_paths_that_are_not_utf8_or_loops_or_no_files(small_model: tuple[str, ...], tmp_path: Path) -> None:
    loop, fifo = tmp_path / "loop", tmp_path / "fifo.yaml"
    loop.symlink_to(loop)
    os.mkfifo(fifo)
    started = time.monotonic()
    bad = os.fsdecode(b"a\xffb")
    assert "argument 3, 'run.dir=a\\udcffb', is not UTF-8 text" in error_line("train", CONFIG, f"run.dir={bad}")
    loops = {
        ("train", CONFIG, *small_model, f"run.dir={loop}"): "cannot be read: Too many levels of symbolic links",
        ("train", CONFIG, f"data.path={loop}"): "cannot be read: Too many levels of symbolic links",
        ("export", loop, "--out", tmp_path / "out"): f"{loop}: cannot be read: Too many levels of symbolic links",
        ("synth", "--rows", 20, "--out", loop): f"{loop}: is a loop of symbolic links",
        ("plan", CONFIG, "--world-size", 2, "--tables", fifo): "cannot read the tables: it is a FIFO",
        ("plan", CONFIG, "--world-size", 2, "--device", fifo): "cannot read the hardware: it is a FIFO",
    }
    for arguments, message in loops.items():
        assert message in error_line(*arguments)
    assert time.monotonic() - started < 180


def test_no_config_and_numbers_beyond_their_range() -> None:
    assert "no CONFIG is given: 'data.path=x' is a setting" in error_line("train", "data.path=x")
    assert "is not a whole number from 1 to 1024" in error_line("train", CONFIG, "--nproc", 10**12)
    assert "has more than 15 digits" in error_line("synth", "--out", "x", "--rows", 10**400)


def test_layers_beyond_the_memory_are_found_before_anything_is_allocated(small_model: tuple[str, ...]) -> None:
    line = error_line("train", CONFIG, *small_model, "model.bottom_mlp=[1000000000,1000000000]", "--nproc", 2)
    assert line.startswith("mlet: error: model.bottom_mlp: the dense layers and W2 need at least ")


def test_once_names_the_settings_that_differ(small_model: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("train", CONFIG, *small_model, "train.max_steps=1", f"run.dir={tmp_path / 'run #1'}", "--once")
    mlet(*arguments)
    mlet(*arguments)
    line = error_line(*arguments, "train.seed=4")
    assert f"{tmp_path / 'run #1'} holds a run that finished with other settings: train.seed was 0, is 4; " in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (OSError(40, "Too many levels of symbolic links"), "Too many levels of symbolic links"),
        (MemoryError(), "memory ran out; use smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes. Error"),
            "999 bytes",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, message: str) -> None:
    found = refusal(error)
    assert isinstance(found, UserError)
    assert message in str(found)
    outer = ValueError("wrapped")
    outer.__cause__ = error
    assert str(refusal(outer)) == str(found)


def test_other_errors_keep_their_traceback() -> None:
    for error in (KeyError("x"), FileNotFoundError(2, "No such file"), RuntimeError("other")):
        assert refusal(error) is None
