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
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from step_arms import ARMS
from step_cases import DEFAULT, Sizes, all_cases
from step_measure import RATIOS, measure

from mlet_dist.openmp import thread_environment
from mlet_dist.training.process_group import join_ranks


def run_rank(names: list[str], args: argparse.Namespace) -> None:
    """Run cases as one of their ranks; rank 0 prints a line of JSON for each."""
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
    for name in ARMS:
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


def _sizes(args: argparse.Namespace) -> Sizes:
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
