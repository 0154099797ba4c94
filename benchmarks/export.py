"""Compare `mlet export` of a large table with a plain read of its W1, and with a script that loads all of W1 at once.

    .venv/bin/python benchmarks/export.py --out DIR               # DIR is on the disk to measure; 10 million rows, 6 GB
    .venv/bin/python benchmarks/export.py --out DIR --rows 500000 --rounds 1 --json     # quick; the last line is JSON

First, a run is written to DIR: one table, W1 of --rows × 128 float32, as --shards ranks would have written it. Then
these methods take turns, each in its own process, which reports its time without imports and its peak memory:

  read       read the checkpoint's files from beginning to end, with one thread and one buffer of 16 MiB
  collapse   export the run as `mlet export` does
  load_all   load W1 with dcp.load, multiply once, and save with dcp.save

Each method runs warm, with the files in the page cache, and cold, after they have been dropped from it
(POSIX_FADV_DONTNEED; the host of a virtual machine may still cache them). Ratios are medians over rounds of the ratio
of the times of one round, and also ratios of the fastest times: when other processes use the cores, the plain read,
which needs little CPU time, is slowed least. The three figures at the end are cold medians, as for a job that reads
more than the memory of a machine.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS = ("read", "collapse", "load_all")
TABLE, HIDDEN_DIM, EMBEDDING_DIM = "C1", 128, 16


def checkpoint_files(run: Path) -> list[Path]:
    """Return the files of a run's checkpoint."""
    return sorted((run / "checkpoints").glob("*/*.distcp"))


def read(run: Path, _: Path) -> Callable[[], None]:
    """Return a function that reads the checkpoint sequentially."""

    def action() -> None:
        buffer = bytearray(1 << 24)
        for path in checkpoint_files(run):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return action


def collapse(run: Path, out: Path) -> Callable[[], None]:
    """Return a function that exports the run."""
    from mlet_dist.export.collapse.run_collapse import export_run

    return lambda: export_run(run, out) and None


def load_all(run: Path, out: Path) -> Callable[[], None]:
    """Return a function that does what a short script would do."""
    import torch
    from torch.distributed import checkpoint as dcp

    from mlet_dist.models.spec import TABLES_PREFIX

    def action() -> None:
        metadata = dcp.FileSystemReader(checkpoint_files(run)[0].parent).read_metadata().state_dict_metadata
        state = {name: torch.empty(found.size) for name, found in metadata.items()}
        dcp.load(state, checkpoint_id=checkpoint_files(run)[0].parent, no_dist=True)
        prefix = f"model.{TABLES_PREFIX}"
        rows = state.pop(f"{prefix}embedding_bags.{TABLE}.weight")
        state[f"{prefix}embedding_bags.{TABLE}.weight"] = rows @ state.pop(f"{prefix}projections.{TABLE}.weight")
        dcp.save(state, checkpoint_id=out, no_dist=True)

    return action


def make(arguments: argparse.Namespace) -> None:
    """Write the run."""
    from made_run import make_run

    from mlet_dist.config.model_section import ModelConfig

    model = ModelConfig(embedding_dim=EMBEDDING_DIM, hidden_dim=HIDDEN_DIM, bottom_mlp=(16,), top_mlp=(16,))
    make_run(Path(arguments.out) / "run", {TABLE: arguments.rows}, model, arguments.shards)


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one of the methods in this process."""
    out = Path(arguments.out)
    action = {"read": read, "collapse": collapse, "load_all": load_all}[arguments.child](out / "run", out / "made")
    started, cpu = time.perf_counter(), time.process_time()
    action()
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return spent | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_child(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run this program again for one of the methods, and remove what it wrote."""
    command = [sys.executable, __file__, "--child", method, "--out", arguments.out]
    command += ["--rows", str(arguments.rows), "--shards", str(arguments.shards)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(Path(arguments.out) / "made", ignore_errors=True)
    os.sync()
    return json.loads(output.splitlines()[-1]) if output else {}


def drop(run: Path) -> None:
    """Drop the checkpoint from the page cache, so that the next reads come from the disk."""
    for path in checkpoint_files(run):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods in turn, warm and cold."""
    run = Path(arguments.out) / "run"
    found: dict[str, dict[str, list[float]]] = {kind: {method: [] for method in METHODS} for kind in ("warm", "cold")}
    peaks, cpu = dict.fromkeys(METHODS, 0), {method: [] for method in METHODS}
    for _ in range(arguments.rounds):
        for kind, times in found.items():
            for method in METHODS:
                if kind == "cold":
                    drop(run)
                else:
                    read(run, run)()
                result_of_round = in_child(method, arguments)
                times[method].append(result_of_round["seconds"])
                cpu[method].append(result_of_round["cpu_seconds"])
                peaks[method] = max(peaks[method], result_of_round["peak_rss_bytes"])
    size = sum(path.stat().st_size for path in checkpoint_files(run))
    result: dict[str, Any] = {"rows": arguments.rows, "bytes": size, "rounds": arguments.rounds}
    for kind, times in found.items():
        result |= {f"{kind}_{method}_gb_per_s": size / 1e9 / statistics.median(times[method]) for method in METHODS}
        for other_method, name in (("read", "collapse_over_read"), ("load_all", "load_all_over_collapse")):
            pairs = zip(times[other_method], times["collapse"], strict=True)
            result[f"{kind}_{name}"] = statistics.median(other / ours for other, ours in pairs)
            result[f"{kind}_{name}_fastest"] = min(times[other_method]) / min(times["collapse"])
    result |= {f"{method}_cpu_seconds": min(times) for method, times in cpu.items()}
    result["load_all_peak_rss_bytes"] = peaks["load_all"]
    for name in ("collapse_over_read", "load_all_over_collapse"):
        result[name] = result[f"cold_{name}"]
    return result | {"peak_rss_bytes": peaks["collapse"]}


def main() -> None:
    """Write the run, measure, clean up and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=".", help="an existing directory on the disk to measure (default: the current one)"
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument(
        "--shards",
        type=int,
        default=8,
        help="the number of ranks that trained the run; one shard at a time is in memory (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--child", choices=["make", *METHODS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.child == "make":
        make(arguments)
        return
    if arguments.child is not None:
        print(json.dumps(child(arguments)))
        return
    arguments.out = str(Path(arguments.out) / "benchmark-export")
    Path(arguments.out).mkdir()
    try:
        in_child("make", arguments)
        found = measure(arguments)
    finally:
        shutil.rmtree(arguments.out)
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:28} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
