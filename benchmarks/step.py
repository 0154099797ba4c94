"""Compare whole training steps of plain PyTorch, of TorchRec's single-layer tables and of MLET.

    .venv/bin/python benchmarks/step.py --data data/criteo --json     # the default cases, in under ten minutes
    .venv/bin/python benchmarks/step.py --case 128-1-uniform-sgd      # one: rows a rank, ranks, ids, optimizer
    .venv/bin/python benchmarks/step.py --list                        # the names of all cases

The models of a case (benchmarks/step_arms.py) take turns in one process group, on the same batches, with some steps in
each round. A ratio is the median over rounds of the ratio of two times of one round, so that a load that comes and goes
touches both. ``ms`` are medians of wall time, and ``cpu_ms`` of the processor time of rank 0, which other processes
disturb less. Ranks have the threads and the waiting that `mlet train` gives them.

Beside the times stand what each model's step sends and waits for, and what no step can do without (``floor``). Real ids
come from a prepared data set (``--data``); without it, made ids take their place, in tables of similar sizes.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

MODELS = ("plain_single", "plain_mlet", "single", "single_planned", "mlet_single", "composed", "mlet")
RATIOS = {
    "single_over_plain": ("single", "plain_single"),
    "mlet_single_over_plain": ("mlet_single", "plain_single"),
    "mlet_over_plain_mlet": ("mlet", "plain_mlet"),
    "mlet_over_single": ("mlet", "single"),
    "mlet_over_mlet_single": ("mlet", "mlet_single"),
    "mlet_over_single_planned": ("mlet", "single_planned"),
    "composed_over_mlet": ("composed", "mlet"),
}
_NOT_TIMED = 2  # the first steps of a round find the caches filled by other models
_FEWEST_ROUNDS = 3
_ROWS_A_ROUND = 1280


def measure(case: Any, sizes: Any, worker: Any, seconds: float, steps: int | None) -> dict[str, Any]:
    """Run the models of a case in turn for about ``seconds``, and return its figures."""
    from step_arms import ARMS
    from step_cases import batches_of, spec_of
    from step_counters import count_step_operations
    from step_floor import floor
    from traffic import count_traffic

    batches = batches_of(case, sizes, worker.rank)
    runs = {name: arm(case, sizes, batches, worker) for name, arm in ARMS.items()}
    operations, sent = {}, {}
    for name, run in runs.items():
        for _ in islice(run, _NOT_TIMED):  # creates what is created lazily
            pass
        with count_step_operations() as counts:
            next(run)
        operations[name] = {
            "collectives": counts.collectives,
            "host_synchronisations": counts.host_synchronisations,
        }
        with count_traffic() as traffic:
            next(run)
        sent[name] = traffic.vector_bytes
    wall, cpu = _times(runs, worker, seconds, steps or max(1, _ROWS_A_ROUND // case.batch_size))
    for run in runs.values():
        run.close()  # type: ignore[attr-defined]
    product = operations["mlet"]
    return {
        **vars(case),
        "case": case.name,
        "ids_from": "data set" if case.ids == "real" and sizes.data is not None else "made",
        "device": worker.device.type,
        "threads": _threads(),
        "rounds": len(wall["mlet"]),
        "ms": {name: statistics.median(times) for name, times in wall.items()},
        "quartiles_ms": {name: _quartiles(times) for name, times in wall.items()},
        "cpu_ms": {name: statistics.median(times) for name, times in cpu.items()},
        **{ratio: _paired(wall, *names) for ratio, names in RATIOS.items()},
        "quartiles": {ratio: _quartiles(_pairs(wall, *names)) for ratio, names in RATIOS.items()},
        "cpu_ratios": {ratio: _paired(cpu, *names) for ratio, names in RATIOS.items()},
        "collectives_per_step": sum(product["collectives"].values()),
        "host_synchronisations_per_step": product["host_synchronisations"],
        "operations": operations,
        "vector_bytes": sent,
        "floor": floor(
            spec_of(case, sizes, single_layer=False), batches[0], worker, adagrad=case.optimizer == "adagrad"
        ),
    }


def _times(
    runs: dict[str, Iterator[None]], worker: Any, seconds: float, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return milliseconds of a step by model and round: wall time, and this process's processor time."""
    import torch
    from step_floor import synchronize
    from torch import distributed as dist

    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    goes_on = True
    while goes_on:
        forward = len(wall["mlet"]) % 2
        for name in list(runs)[:: 1 if forward else -1]:
            dist.barrier()
            for _ in islice(runs[name], min(_NOT_TIMED, steps)):
                pass
            synchronize(worker.device)
            before, cpu_before = time.perf_counter(), time.process_time()
            for _ in islice(runs[name], steps):
                pass
            synchronize(worker.device)
            wall[name].append((time.perf_counter() - before) / steps * 1e3)
            cpu[name].append((time.process_time() - cpu_before) / steps * 1e3)
        is_time_left = time.perf_counter() - started < seconds or len(wall["mlet"]) < _FEWEST_ROUNDS
        decision = torch.tensor([int(is_time_left)], device=worker.device)
        dist.broadcast(decision, 0)
        goes_on = bool(decision.item())
    return wall, cpu


def _pairs(times: dict[str, list[float]], numerator: str, denominator: str) -> list[float]:
    return [above / below for above, below in zip(times[numerator], times[denominator], strict=True)]


def _paired(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    return statistics.median(_pairs(times, numerator, denominator))


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")[::2]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def run_rank(names: list[str], args: argparse.Namespace) -> None:
    """Run cases as one of their ranks; rank 0 prints a line of JSON for each."""
    from step_cases import all_cases

    from mlet_dist.training.process_group import join_ranks

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    by_name = {case.name: case for case in all_cases()}
    with join_ranks() as worker:
        for name in names:
            result = measure(by_name[name], _sizes(args), worker, args.seconds, args.steps)
            if worker.is_first:
                print(json.dumps(result), flush=True)


def start_ranks(ranks: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Start the ranks of some cases on this machine, with their threads as `mlet train --nproc` sets them."""
    from mlet_dist.openmp import thread_environment

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, os.path.abspath(__file__), *sys.argv[1:], "--case", *names]
    environment = os.environ | thread_environment(ranks, os.environ) | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        sys.exit(process.returncode)


def show(result: dict[str, Any]) -> None:
    """Print one case as a table."""
    floor = result["floor"]
    print(
        f"\n{result['case']}: {result['batch_size']} rows on each of {result['ranks']} ranks, {result['ids']} ids "
        f"({result['ids_from']}), {result['optimizer']}; {result['device']}, {result['threads']} threads a rank, "
        f"{result['rounds']} rounds\n"
        f"{'':16}{'ms':>9}{'quartiles':>18}{'cpu ms':>9}{'collectives':>13}{'syncs':>7}{'MB sent':>9}"
    )
    for name in MODELS:
        low, high = result["quartiles_ms"][name]
        counted = result["operations"][name]
        print(
            f"{name:16}{result['ms'][name]:9.2f}{f'{low:.2f} - {high:.2f}':>18}{result['cpu_ms'][name]:9.2f}"
            f"{sum(counted['collectives'].values()):13}{counted['host_synchronisations']:7}"
            f"{result['vector_bytes'][name] / 1e6:9.2f}"
        )
    for ratio in RATIOS:
        low, high = result["quartiles"][ratio]
        print(f"  {ratio:26}{result[ratio]:6.2f}  ({low:.2f} - {high:.2f}; cpu {result['cpu_ratios'][ratio]:.2f})")
    print(
        f"  floor: products {floor['products_ms']:.2f} ms, {floor['flops'] / 1e9:.2f} GFLOP, "
        f"rows {floor['row_bytes'] / 1e6:.2f} MB",
        flush=True,
    )


def _sizes(args: argparse.Namespace) -> Any:
    from step_cases import Sizes

    data = None if args.data is None else Path(args.data)
    mlps = tuple(args.bottom_mlp), tuple(args.top_mlp)
    return Sizes(data, args.tables, args.num_embeddings, args.hidden_dim, args.embedding_dim, *mlps)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases of --list (default: those marked there)")
    parser.add_argument("--list", action="store_true", help="print the names of all cases, and end")
    parser.add_argument("--data", help="a data set of `mlet prepare`, for real ids (default: made ids)")
    parser.add_argument("--seconds", type=float, default=20, help="time of a case (default %(default)s)")
    parser.add_argument("--steps", type=int, help="timed steps of a model in a round (default: by batch size)")
    parser.add_argument("--tables", type=int, default=26, help="for made ids (default %(default)s)")
    parser.add_argument("--num-embeddings", type=int, default=40_000, help="of uniform and Zipf ids")
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--bottom-mlp", type=int, nargs="+", default=[512, 256, 128], help="hidden layers")
    parser.add_argument("--top-mlp", type=int, nargs="+", default=[512, 256], help="hidden layers")
    parser.add_argument("--json", action="store_true", help="print a JSON object with all cases as the last line")
    return parser.parse_args()


def main() -> int:
    """Print the cases, or start their ranks and print their figures, or run as one of the ranks."""
    args = _parse()
    if "RANK" in os.environ:
        run_rank(args.case, args)
        return 0
    from step_cases import DEFAULT, all_cases

    cases = {case.name: case for case in all_cases()}
    if args.list:
        for name in cases:
            print(f"{name}{' (default)' if name in DEFAULT else ''}")
        return 0
    names = args.case or list(DEFAULT)
    for name in names:
        if name not in cases:
            print(f"error: no case {name!r}; --list shows them", file=sys.stderr)
            return 2
    results = []
    for ranks, together in groupby(sorted(names, key=lambda name: cases[name].ranks), lambda name: cases[name].ranks):
        for result in start_ranks(ranks, list(together)):
            results.append(result)
            show(result)
    if args.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "cases": results}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
