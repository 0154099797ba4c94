"""The benchmark of whole steps, as `benchmarks/step.py --json` prints it."""

import json
import subprocess
import sys

from tests.gpu.machine import Machine, NotHere
from tests.helpers.mlet_command import ROOT

_SCRIPT = ROOT / "benchmarks" / "step.py"
_LIMIT_S = 200.0
_CASES = (("128", "uniform-sgd"), ("4096", "zipf-sgd"), ("16384", "zipf-adagrad"))


def step_benchmark(machine: Machine) -> str:
    """Times of whole steps: plain PyTorch, TorchRec's single layer, MLET."""
    machine.needs_cuda("times on a CPU are those of `make bench`")
    if not _SCRIPT.exists():
        raise NotHere("benchmarks/step.py is not here")
    ranks = max(each for each in (1, 2, 4) if each <= machine.largest)  # of the benchmark's cases
    command = [sys.executable, str(_SCRIPT), "--json", "--seconds", "15"]
    command += ["--case", *(f"{batch}-{ranks}-{ids}" for batch, ids in _CASES)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"it took longer than {_LIMIT_S:.0f} s; so far: {error.stdout!r:.2000}") from None
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    lines = [
        f"batch {case['batch_size']}, {case['ranks']} ranks, {case['ids']}, {case['optimizer']}: "
        + ", ".join(f"{name} {value:.3g} ms" for name, value in case["ms"].items() if value is not None)
        for case in result["cases"]
    ]
    return "\n".join([f"{len(lines)} cases", *lines])
