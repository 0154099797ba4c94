"""Measure how OpenMP's threads should wait: steps of DLRM's dense layers, alone and beside busy processes.

    .venv/bin/python benchmarks/openmp_waiting.py                     # in about nine minutes on two cores
    .venv/bin/python benchmarks/openmp_waiting.py --batch 4096 --busy 0 4

Each figure is the mean of one process of torch alone, since OpenMP reads its settings when it starts. ``default`` is
what GNU's OpenMP does by itself, and the numbers are ``GOMP_SPINCOUNT``; 0 is ``OMP_WAIT_POLICY=PASSIVE``.
``mlet_dist/openmp.py`` has the number that was chosen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

SPINS = ("default", "0", "200", "500", "1000", "2000", "5000", "20000")
_LAYERS = (13, 512, 256, 128, 16, 367, 512, 256, 1)
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def steps(batch: int, seconds: float) -> dict[str, float]:
    """Train the dense layers for some seconds; return the milliseconds of a step, wall and processor time."""
    import torch

    layers = [torch.nn.Sequential(torch.nn.Linear(*sizes), torch.nn.ReLU()) for sizes in pairwise(_LAYERS)]
    model, inputs = torch.nn.Sequential(*layers), torch.randn(batch, _LAYERS[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        step()
        count += 1
    return {"ms": (time.perf_counter() - started) / count * 1e3, "cpu_ms": (time.process_time() - cpu) / count * 1e3}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep as many processes computing within the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(spin: str, threads: int, batch: int, seconds: float) -> dict[str, float]:
    """Run ``steps`` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in _WAITING}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({} if spin == "default" else {"GOMP_SPINCOUNT": spin})
    command = [sys.executable, os.path.abspath(__file__), "--steps-of", str(batch), "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a table: one row for each way of waiting, one column for each number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="rows (default %(default)s)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="busy processes beside (default: 0 2)")
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, in turn (default %(default)s)")
    parser.add_argument("--spins", nargs="+", default=SPINS, help="values of GOMP_SPINCOUNT, or default")
    parser.add_argument("--steps-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps_of is not None:
        print(json.dumps(steps(args.steps_of, args.seconds)))
        return
    cores = len(os.sched_getaffinity(0))
    ways = [*((spin, cores) for spin in args.spins), ("default", 1)]
    print(f"batch {args.batch}, {cores} cores: median ms of a step (processor ms)")
    print(f"{'GOMP_SPINCOUNT':>15}{'threads':>9}" + "".join(f"{f'{count} busy':>22}" for count in args.busy))
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for count in args.busy:
        with busy_processes(count):
            for _ in range(args.repeats):
                for spin, threads in ways:
                    measured = measure(spin, threads, args.batch, args.seconds)
                    found.setdefault((spin, threads, count), []).append(measured)
    for spin, threads in ways:
        cells = []
        for count in args.busy:
            times = found[spin, threads, count]
            ms, cpu = (statistics.median(each[name] for each in times) for name in ("ms", "cpu_ms"))
            cells.append(f"{f'{ms:.2f} ({cpu:.2f})':>22}")
        print(f"{spin:>15}{threads:>9}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
