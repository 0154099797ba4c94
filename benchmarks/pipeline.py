"""Compare a training step of DLRM in the plain loop and in TorchRec's pipeline, on the same batches.

    .venv/bin/python benchmarks/pipeline.py --ranks 2                      # with synthetic batches in memory
    .venv/bin/python benchmarks/pipeline.py --ranks 2 --data data/criteo   # with batches as `mlet train` reads them
    torchrun ... benchmarks/pipeline.py --json                             # on any ranks; the last line is JSON

Each loop trains its own model; both use one process group and take turns, with some steps in each round. The first
steps of a round are not timed, since the pipeline and the loader have prepared them while the other loop ran. The
ratio is the median over rounds of pipelined / plain, both from the same round. The ratio of the fastest rounds is
printed, too, since other processes on the machine affect it least.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.data.loading.loader import BATCHES_AHEAD, Batch, DataLoader
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.process_group import Worker, join_ranks
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import Predicted, take_steps
from mlet_dist.training.timing import StepTimer

LOOPS = {"plain": False, "pipelined": True}
NOT_TIMED = BATCHES_AHEAD + 2


@dataclass(frozen=True)
class Case:
    """One configuration of the benchmark."""

    exchange: str
    data: str | None
    local_batch_size: int
    hidden_dim: int
    embedding_dim: int
    mlp: tuple[int, ...]
    num_tables: int
    num_embeddings: int


def spec_of(case: Case) -> ModelSpec:
    """Return the model of a case, with the columns of the data set or with synthetic tables."""
    model = ModelConfig(
        embedding_dim=case.embedding_dim, hidden_dim=case.hidden_dim, bottom_mlp=case.mlp, top_mlp=case.mlp
    )
    if case.data is not None:
        schema = DatasetSchema.load(Path(case.data))
        return ModelSpec(model, schema.dense, schema.sparse, seed=0)
    tables = tuple(SparseFeature(f"C{index}", case.num_embeddings) for index in range(1, case.num_tables + 1))
    return ModelSpec(model, tuple(f"I{index}" for index in range(1, 14)), tables, seed=0)


def batches(case: Case, spec: ModelSpec, worker: Worker) -> Iterator[Batch]:
    """Iterate without end over batches of this rank: those of the data set, or four with Zipf(1.05) ids."""
    if case.data is not None:
        loader = DataLoader(
            Path(case.data),
            "train",
            batch_size=case.local_batch_size * worker.world_size,
            rank=worker.rank,
            world_size=worker.world_size,
            dense_features=None,
            sparse_features=None,
        )
        return chain.from_iterable(repeat(loader))
    return cycle(synthetic_batches(case, spec, worker))


def synthetic_batches(case: Case, spec: ModelSpec, worker: Worker) -> list[Batch]:
    """Return four batches, on the host."""
    generator = torch.Generator().manual_seed(worker.rank)
    weights = torch.arange(1, case.num_embeddings + 1, dtype=torch.float64).pow(-1.05)
    size, names = case.local_batch_size, [feature.name for feature in spec.sparse]
    found = []
    for _ in range(4):
        ids = torch.multinomial(weights, size * len(names), replacement=True, generator=generator)
        sparse = KeyedJaggedTensor(
            names,
            ids,
            lengths=torch.ones(len(ids), dtype=torch.int64),
            stride=size,
            length_per_key=[size] * len(names),
            offset_per_key=[size * index for index in range(len(names) + 1)],
        )
        dense = torch.rand(size, len(spec.dense), generator=generator)
        labels = torch.randint(0, 2, (size,), generator=generator).float()
        batch = Batch(dense, sparse, labels, size, size * worker.world_size)
        found.append(batch.pin_memory() if worker.device.type == "cuda" else batch)
    return found


def training(case: Case, worker: Worker, pipelined: bool) -> Iterator[Predicted | Finding]:
    """Train without end; each element is the result of one step."""
    spec = spec_of(case)
    model = build_training_model(spec, torch.device("meta"))
    config = OptimizerConfig(learning_rate=0.01)
    fuse_row_optimizer(model, config)
    sharded, _ = shard_model(model, worker, case.local_batch_size, ShardingConfig(exchange=case.exchange))
    sharded.train()
    optimizer = build_optimizer(sharded, config)
    training = Training(
        sharded, optimizer, BinaryMetrics(worker.device), steps=1, batches_per_epoch=1, batch_size=1, rows_per_epoch=1
    )
    guard = Guard(training, worker.device, "stop", 0)
    timer = StepTimer(sharded, worker.device, case.local_batch_size)
    return take_steps(training, batches(case, spec, worker), worker.device, guard, timer, pipelined=pipelined)


def measure(case: Case, rounds: int, steps: int, worker: Worker) -> dict[str, Any]:
    """Measure the milliseconds per step of both loops, which take turns."""
    runs = {loop: training(case, worker, pipelined) for loop, pipelined in LOOPS.items()}
    found: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for index in range(rounds + 1):
        for loop in list(LOOPS)[:: 1 if index % 2 else -1]:
            dist.barrier()
            for _ in islice(runs[loop], NOT_TIMED):
                pass
            synchronize(worker.device)
            started = time.perf_counter()
            for _ in islice(runs[loop], steps):
                pass
            synchronize(worker.device)
            if index:  # the first round also creates what is created lazily
                found[loop].append((time.perf_counter() - started) / steps * 1e3)
    ratios = [pipelined / plain for plain, pipelined in zip(found["plain"], found["pipelined"], strict=True)]
    return {
        **vars(case),
        "world_size": worker.world_size,
        "device": worker.device.type,
        "median_ms": {loop: statistics.median(times) for loop, times in found.items()},
        "quartiles_ms": {loop: quartiles(times) for loop, times in found.items()},
        "fastest_ms": {loop: min(times) for loop, times in found.items()},
        "pipelined_over_plain": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "fastest_over_fastest": min(found["pipelined"]) / min(found["plain"]),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2]


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(result: dict[str, Any]) -> None:
    """Print one case as a line."""
    times = "   ".join(
        f"{loop} {result['median_ms'][loop]:.1f} ms ({low:.1f} - {high:.1f})"
        for loop, (low, high) in result["quartiles_ms"].items()
    )
    low, high = result["ratio_quartiles"]
    print(
        f"{result['exchange']:15}local batch size {result['local_batch_size']:6}, {result['world_size']} ranks, "
        f"{result['device']}   {times}   ratio {result['pipelined_over_plain']:.2f} ({low:.2f} - {high:.2f}), "
        f"fastest {result['fastest_over_fastest']:.2f}",
        flush=True,
    )


def main() -> None:
    """Start the ranks unless this process is one, run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, default=2, help="local ranks, unless torchrun started this process (default %(default)s)"
    )
    parser.add_argument("--data", help="a data set of `mlet prepare` (default: synthetic batches)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096], help="rows on each rank")
    parser.add_argument("--exchange", nargs="+", choices=["auto", *EXCHANGES], default=["auto"])
    parser.add_argument("--tables", type=int, default=26, help="for synthetic batches (default %(default)s)")
    parser.add_argument(
        "--num-embeddings", type=int, default=100_000, help="for synthetic batches (default %(default)s)"
    )
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument(
        "--mlp", type=int, nargs="+", default=[512, 256], help="hidden layers of the bottom and the top MLP"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=10, help="timed steps of each loop in a round (default %(default)s)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object as the last line: the first case, with the others in `cases`",
    )
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        sys.exit(
            subprocess.run(
                [sys.executable, *launch, os.path.abspath(__file__), *sys.argv[1:]], env=environment, check=False
            ).returncode
        )
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with join_ranks() as worker:
        results = []
        for batch in args.batch:
            for exchange in args.exchange:
                case = Case(
                    exchange,
                    args.data,
                    batch,
                    args.hidden_dim,
                    args.embedding_dim,
                    tuple(args.mlp),
                    args.tables,
                    args.num_embeddings,
                )
                results.append(measure(case, args.rounds, args.steps, worker))
                if worker.is_first:
                    show(results[-1])
        if args.json and worker.is_first:
            print(json.dumps({**results[0], "cases": results[1:]}), flush=True)


if __name__ == "__main__":
    main()
