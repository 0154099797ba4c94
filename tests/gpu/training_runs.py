"""Whole runs of `mlet train` on this machine's device: pipeline, resume, precision, compilation, lost ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.machine import CONFIG, Machine, NotHere
from tests.helpers.mlet_command import ROOT
from tests.helpers.train_in_ranks import records, stopped_after, train_in_ranks

_START_S = 600.0  # within which a job has to save its first checkpoint; only a machine that is busy takes as long
_END_S = 150.0  # within which a job with a lost rank has to end; the heartbeats say so much earlier


def pipelined_is_plain(machine: Machine) -> str:
    """TorchRec's pipeline and the plain loop: bitwise the same weights, with deterministic algorithms."""
    for world_size in machine.world_sizes:
        folder = machine.folder
        found = {
            name: _train(machine, world_size, folder / name, f"train.pipelined={name}")["weights_sha256"]
            for name in ("true", "false")
        }
        assert found["true"] == found["false"], f"{world_size} ranks: the weights differ"
        assert records(folder / "true") == records(folder / "false"), f"{world_size} ranks: the records differ"
    return "24 steps with Adagrad: the same weights_sha256 and records"


def resumed_is_uninterrupted(machine: Machine) -> str:
    """A run that resumes from a checkpoint: bitwise the same weights, with deterministic algorithms."""
    for world_size in machine.world_sizes:
        folder = machine.folder
        settings = ("train.checkpoint_every=8", "train.keep_last=4")
        whole = _train(machine, world_size, folder / "whole", *settings)
        resumed = stopped_after(8, folder / "whole", folder / "resumed")
        again = _train(machine, world_size, resumed, *settings)
        assert again["first_step"] == 8, again
        assert again["weights_sha256"] == whole["weights_sha256"], f"{world_size} ranks: the weights differ"
    return "from step 8 of 24: the same weights_sha256"


def same_weights_on_all_numbers_of_ranks(machine: Machine) -> str:
    """Metrics of runs on different numbers of ranks."""
    if len(machine.world_sizes) < 2:
        raise NotHere("needs at least two numbers of ranks; there is one GPU")
    found = {size: _train(machine, size, machine.folder / "run")["valid_logloss"] for size in machine.world_sizes}
    first = next(iter(found.values()))
    assert all(abs(each - first) < 1e-4 for each in found.values()), found
    return "valid LogLoss " + ", ".join(f"{value:.6f} on {size}" for size, value in found.items())


def precision_of_dense_layers(machine: Machine) -> str:
    """Runs in tf32 and bf16: LogLoss close to that of fp32."""
    size = machine.largest
    found = {
        name: _train(machine, size, machine.folder / "run", f"train.precision={name}")["valid_logloss"]
        for name in ("fp32", "tf32", "bf16")
    }
    assert all(abs(each - found["fp32"]) < 0.01 for each in found.values()), found
    return "valid LogLoss " + ", ".join(f"{name} {value:.5f}" for name, value in found.items())


def compiled_dense_layers(machine: Machine) -> str:
    """A run with compiled dense layers: LogLoss close to that of the others."""
    size = machine.largest
    started = time.monotonic()
    compiled = _train(machine, size, machine.folder / "run", "train.compile=true")["valid_logloss"]
    seconds = time.monotonic() - started
    eager = _train(machine, size, machine.folder / "run")["valid_logloss"]
    assert abs(compiled - eager) < 1e-4, (compiled, eager)
    return f"valid LogLoss {compiled:.6f}, {eager:.6f} without; {seconds:.0f} s with compilation"


def killed_rank(machine: Machine) -> str:
    """A rank is killed: the job ends by itself, and the same command resumes it to the same weights."""
    size = machine.largest
    settings = (*machine.small_run, "train.max_steps=200", "train.epochs=4", "train.checkpoint_every=10")
    run = machine.folder / "run"
    job = _start(machine, size, run, settings)
    rank = _ranks(job)[-1]
    _wait_for_checkpoint(job, run)
    os.kill(rank, signal.SIGKILL)
    ended, code, errors = _end(job)
    assert code != 0, "the job has finished before its rank was killed"
    again = _start(machine, size, run, settings)
    output, more = again.communicate(timeout=_START_S)
    assert again.returncode == 0, more[-2000:]
    result = json.loads(output.splitlines()[-1])
    assert result["first_step"] > 0, result
    whole = train_in_ranks(machine.pools, size, *settings, f"run.dir={machine.folder / 'whole'}")
    assert result["weights_sha256"] == whole["weights_sha256"], "the weights differ from those without a kill"
    return (
        f"ended after {ended:.0f} s with code {code} ({errors}); resumed from step {result['first_step']}, same weights"
    )


def stopped_rank(machine: Machine) -> str:
    """A rank is stopped by SIGSTOP, as if its machine hung: the others end by themselves."""
    if machine.largest < 2:
        raise NotHere("needs two ranks; there is one GPU")
    settings = (*machine.small_run, "train.max_steps=100000", "train.epochs=100000", "train.collective_timeout_s=15")
    run = machine.folder / "run"
    job = _start(machine, machine.largest, run, (*settings, "train.checkpoint_every=10"))
    rank = _ranks(job)[-1]
    _wait_for_checkpoint(job, run)
    os.kill(rank, signal.SIGSTOP)
    ended, code, errors = _end(job)
    assert code != 0
    return f"ended after {ended:.0f} s with code {code} ({errors})"


def _train(machine: Machine, world_size: int, run: Path, *settings: str) -> dict[str, Any]:
    return train_in_ranks(machine.pools, world_size, *machine.small_run, *settings, f"run.dir={run}")


def _start(machine: Machine, world_size: int, run: Path, settings: tuple[str, ...]) -> "subprocess.Popen[str]":
    device = f"train.device={machine.device}"
    command = [sys.executable, "-m", "mlet_dist", "train", str(CONFIG), *settings, f"run.dir={run}", device]
    # As in the ranks of the pools, to which the weights are compared; threads change the order of additions.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--nproc", str(world_size), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def _ranks(job: "subprocess.Popen[str]") -> list[int]:
    """Wait until the job has started its ranks; return their process ids."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and job.poll() is None:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        found = [int(each) for each in children if b"train" in Path(f"/proc/{each}/cmdline").read_bytes()]
        if found:
            return found
        time.sleep(0.2)
    _fail(job, "the job started no ranks")
    raise AssertionError


def _wait_for_checkpoint(job: "subprocess.Popen[str]", run: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and job.poll() is None:
        complete = [path for path in run.glob("checkpoints/step-*") if not (path / ".incomplete").exists()]
        if complete:
            return
        time.sleep(0.1)
    _fail(job, "the job saved no checkpoint")


def _end(job: "subprocess.Popen[str]") -> tuple[float, int, str]:
    """Wait for the end of a job; return the seconds that it took, its exit code and its last line of errors."""
    started = time.monotonic()
    try:
        _, errors = job.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        _fail(job, f"the job still runs {_END_S:.0f} s after it lost a rank")
        raise
    lines = [line for line in errors.splitlines() if line.startswith("mlet: ")]
    return time.monotonic() - started, job.returncode, lines[-1] if lines else "no line of mlet"


def _fail(job: "subprocess.Popen[str]", what: str) -> None:
    """Kill a job, whose ranks then end, too, and raise AssertionError with its output."""
    for rank in _children(job.pid):
        os.kill(rank, signal.SIGKILL)
    job.kill()
    _, errors = job.communicate()
    raise AssertionError(f"{what} (exit code {job.returncode}): {errors[-2000:]}")


def _children(process: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
