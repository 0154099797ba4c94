"""The embedding step (forward, backward, fused update) under each exchange, beside the plain single-layer table.

    .venv/bin/python benchmarks/exchange.py --ranks 2          # the table, on local gloo ranks
    torchrun … benchmarks/exchange.py --json                   # on any ranks; the last line is one JSON object

All ways run in one process group, in turn, on the same batches; medians and quartiles are of the step's wall time, and
the ratio is of medians. The bytes are what a rank's collectives of vectors carry to other ranks in one step.
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
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from traffic import count_traffic

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)

# TorchRec's own d-dimensional tables, and multi-layer ones: row_wise under each exchange, then owned by a rank.
WAYS = ("single", "after", "reduce_scatter", "unique_rows", "auto", "single_table_wise", "table_wise")


@dataclass(frozen=True)
class Case:
    """One setting of the benchmark."""

    ids: str
    hidden_dim: int
    embedding_dim: int
    local_batch_size: int
    num_tables: int
    num_embeddings: int
    pooling_factor: int


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's own sharder, which offers row_wise on CUDA alone, offering it everywhere."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]


def build(way: str, case: Case, device: torch.device) -> DistributedModelParallel:
    """A sharded collection alone, by one of ``WAYS``."""
    features = [f"f{index}" for index in range(case.num_tables)]
    common: dict[str, Any] = {"num_embeddings": case.num_embeddings, "embedding_dim": case.embedding_dim}
    meta = torch.device("meta")
    if way.startswith("single"):
        tables = [EmbeddingBagConfig(name=name, feature_names=[name], **common) for name in features]
        embeddings, sharder = EmbeddingBagCollection(tables, device=meta), AnyDeviceSharder()
    else:
        layers = [
            MultiLayerEmbeddingBagConfig(name=name, feature_names=[name], hidden_dim=case.hidden_dim, **common)
            for name in features
        ]
        embeddings = MultiLayerEmbeddingBagCollection(layers, device=meta)
        sharder = MultiLayerEmbeddingBagCollectionSharder(
            exchange="auto" if way == "table_wise" else way,
            pooling_factors={name: case.pooling_factor for name in features},
            local_batch_size=case.local_batch_size,
        )
    apply_optimizer_in_backward(torch.optim.SGD, embeddings.embedding_bags.parameters(), {"lr": 0.01})
    world_size = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    topology = Topology(world_size=world_size, local_world_size=local, compute_device=device.type)
    model = torch.nn.Sequential(embeddings)
    sharding = ParameterConstraints(sharding_types=["table_wise" if way.endswith("table_wise") else "row_wise"])
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=case.local_batch_size, constraints=dict.fromkeys(features, sharding)
    )
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])


def batches(case: Case, count: int, device: torch.device) -> list[KeyedJaggedTensor]:
    """Batches of this rank; Zipf ids have exponent 1.05."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    bags = case.local_batch_size * case.num_tables
    ids = bags * case.pooling_factor
    weights = torch.arange(1, case.num_embeddings + 1, dtype=torch.float64).pow(-1.05)
    found = []
    for _ in range(count):
        if case.ids == "zipf":
            values = torch.multinomial(weights, ids, replacement=True, generator=generator)
        else:
            values = torch.randint(0, case.num_embeddings, (ids,), generator=generator)
        lengths = torch.full((bags,), case.pooling_factor, dtype=torch.int64)
        keys = [f"f{index}" for index in range(case.num_tables)]
        found.append(KeyedJaggedTensor(keys, values, lengths=lengths).to(device))
    return found


def step(model: DistributedModelParallel, batch: KeyedJaggedTensor) -> None:
    """One embedding step; the gradients of W2 are left for an optimizer and dropped here."""
    model(batch).values().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(case: Case, steps: int, device: torch.device) -> dict[str, Any]:
    """Time and bytes of every way, interleaved."""
    models = {way: build(way, case, device) for way in WAYS}
    data = batches(case, 4, device)
    sent = {}
    for way, model in models.items():
        step(model, data[0])  # the first step also builds what is built lazily
        with count_traffic() as traffic:
            step(model, data[1])
        sent[way] = traffic.vector_bytes
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(steps):
        for way, model in models.items():
            synchronize(device)
            dist.barrier()
            started = time.perf_counter()
            step(model, data[index % len(data)])
            synchronize(device)
            seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(times) * 1e3 for way, times in seconds.items()}
    spread = {way: [each * 1e3 for each in statistics.quantiles(times, n=4)[::2]] for way, times in seconds.items()}
    return {
        **vars(case),
        "world_size": dist.get_world_size(),
        "device": device.type,
        "single_ms": median["single"],
        "auto_over_single": median["auto"] / median["single"],
        "after_over_auto": median["after"] / median["auto"],
        "table_wise_over_single_table_wise": median["table_wise"] / median["single_table_wise"],
        "table_wise_over_auto": median["table_wise"] / median["auto"],
        "output_bytes": sent,
        "median_ms": median,
        "quartiles_ms": spread,
        "projection_floor_ms": projection_floor_ms(case, data[0], device),
    }


def projection_floor_ms(case: Case, batch: KeyedJaggedTensor, device: torch.device) -> float:
    """The matrix products of W2, forward and backward, for as many rows a table as this rank has distinct ids."""
    per_table = batch.values().view(case.num_tables, -1)
    rows = sum(len(ids.unique()) for ids in per_table) // case.num_tables
    vectors = torch.randn(case.num_tables, rows, case.hidden_dim, device=device)
    weight = torch.randn(case.num_tables, case.hidden_dim, case.embedding_dim, device=device)
    gradient = torch.randn(case.num_tables, rows, case.embedding_dim, device=device)
    times = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        torch.bmm(vectors, weight)
        torch.bmm(gradient, weight.transpose(1, 2))
        torch.bmm(vectors.transpose(1, 2), gradient)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every combination that was asked for."""
    for ids in args.ids:
        for hidden_dim in args.hidden_dim:
            for pooling_factor in args.pooling_factor:
                yield Case(
                    ids, hidden_dim, args.embedding_dim, args.batch, args.tables, args.num_embeddings, pooling_factor
                )


def show(result: dict[str, Any]) -> None:
    """One case as a table."""
    print(
        f"\n{result['ids']} ids, k {result['hidden_dim']}, d {result['embedding_dim']}, "
        f"{result['pooling_factor']} a bag: "
        f"{result['local_batch_size']} a rank, {result['world_size']} ranks, {result['device']}"
    )
    print(f"{'':18}{'ms':>9}{'quartiles':>18}{'/ single':>10}{'MB sent':>10}")
    for way in WAYS:
        median = result["median_ms"][way]
        low, high = result["quartiles_ms"][way]
        ratio = median / result["single_ms"]
        sent = result["output_bytes"][way] / 1e6
        print(f"{way:18}{median:9.1f}{f'{low:.1f} - {high:.1f}':>18}{ratio:10.2f}{sent:10.2f}")
    print(f"{'projection alone':18}{result['projection_floor_ms']:9.1f}", flush=True)


def at_least_one(text: str) -> int:
    """A number of things, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main() -> None:
    """Start ranks unless this is one, run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=at_least_one, default=2, help="local ranks, unless torchrun has started this one"
    )
    parser.add_argument("--batch", type=at_least_one, default=4096, help="bags a feature and rank")
    parser.add_argument("--tables", type=at_least_one, default=26)
    parser.add_argument("--num-embeddings", type=at_least_one, default=100_000)
    parser.add_argument("--hidden-dim", type=int, nargs="+", default=[64])
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--ids", nargs="+", choices=["zipf", "uniform"], default=["zipf"])
    parser.add_argument("--pooling-factor", type=at_least_one, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object: the first case, others in `cases`"
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
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    results = []
    for case in cases(args):
        results.append(measure(case, args.steps, device))
        if dist.get_rank() == 0:
            show(results[-1])
    if args.json and dist.get_rank() == 0:
        print(json.dumps({**results[0], "cases": results[1:]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
