"""Run every benchmark at its smallest size, to see that each still works and what it prints.

    .venv/bin/python benchmarks/run_all.py                 # all, in about a minute on two cores
    .venv/bin/python benchmarks/run_all.py exchange loader # some

At this size the figures say nothing about speed; ``benchmarks/results`` has the sizes and commands that do.
`make bench` runs this script, and tests/benchmarks runs each of its commands.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

_TABLES = "--tables 2 --num-embeddings 50 --hidden-dim 8 --embedding-dim 4"
_MODEL = f"--batch 8 {_TABLES}"
SMALLEST = {
    "compression_arms": "--drift 0 --drift-rows 3000 --policy adaptive --widths 16 8 --budget 0.3 --interval 5 --serve",
    "compression_grid": "--drift --drift-rows 2000 --arms single graded --budgets 0.3 --seeds 2 --out /dev/null",
    "exchange": f"--ranks 2 {_MODEL} --steps 2",
    "owners": "--largest 100000 --batch-size 4096 --ranks 2 8",
    "pipeline": f"--ranks 2 {_MODEL} --mlp 8 --rounds 2 --steps 1",
    "plan_memory": "--networks dlrm --batch 64 --hidden-dim 8 --steps 2",
    "plan_accuracy": "--ranks 2 --batch 8 --rounds 1 --seconds 0.1",
    "checkpoint": "--ranks 2 --num-embeddings 50 --local-batch-size 8 --every 2 --rounds 1 --out {folder}",
    "export": "--rows 1000 --shards 1 --rounds 1 --out {folder}",
    "job_backoff": "--nodes 2 --faults 3 --trials 1",
    "loader": "--rows 5000 --batch-size 64 --shuffle-buffer 1000 --rounds 1",
    "openmp_waiting": "--batch 8 --busy 0 --seconds 0.01 --repeats 1 --spins 0",
    "step": (f"--case 64-2-uniform-sgd {_TABLES} --bottom-mlp 8 --top-mlp 8 --seconds 0 --steps 1 --json"),
    "sizes": "--seeds 1 --layers single --budgets 6x --settings train.max_steps=5 model.top_mlp=[8]",
    "prepare": "--rows 2000 --times 1 --repeats 1",
}
"""By name, the arguments of each benchmark; ``{folder}`` is an empty directory."""


def command(name: str, folder: Path) -> list[str]:
    """The command line of a benchmark at its smallest size."""
    arguments = [word.format(folder=folder) for word in SMALLEST[name].split()]
    return [sys.executable, str(HERE / f"{name}.py"), *arguments]


def main() -> int:
    """Run the benchmarks one after another; return 1 if one of them failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(SMALLEST)} (default: all)")
    names = parser.parse_args().names or list(SMALLEST)
    if unknown := [name for name in names if name not in SMALLEST]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SMALLEST)}")
    failed = []
    for name in names:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            words = command(name, Path(folder))
            print(f"\n$ python benchmarks/{name}.py {shlex.join(words[2:])}", flush=True)
            started = time.perf_counter()
            if subprocess.run(words, check=False).returncode:
                failed.append(name)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
