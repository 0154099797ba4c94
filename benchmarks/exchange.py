"""Compare the embedding step (forward, backward, fused update) under each exchange with that of single-layer tables.

    .venv/bin/python benchmarks/exchange.py --ranks 2          # on local gloo ranks; prints a table
    torchrun ... benchmarks/exchange.py --json                 # on any ranks; the last line is a JSON object

All variants run in one process group, in turn, on the same batches. Medians and quartiles are those of the wall time
of a step, and ratios are ratios of medians. The bytes are those of vectors that a rank's collectives send to other
ranks in one step.
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

# TorchRec's own d-dimensional tables, and multi-layer tables: row_wise under each exchange, and table_wise.
VARIANTS = ("single", "after", "reduce_scatter", "unique_rows", "auto", "single_table_wise", "table_wise")


@dataclass(frozen=True)
class Case:
    """One configuration of the benchmark."""

    ids: str
    hidden_dim: int
    embedding_dim: int
    local_batch_size: int
    num_tables: int
    num_embeddings: int
    pooling_factor: int


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's own sharder, but with row_wise sharding on every device; TorchRec offers it on CUDA only."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]


def build(variant: str, case: Case, device: torch.device) -> DistributedModelParallel:
    """Build a sharded collection as one of ``VARIANTS``."""
    features = [f"f{index}" for index in range(case.num_tables)]
    common: dict[str, Any] = {"num_embeddings": case.num_embeddings, "embedding_dim": case.embedding_dim}
    meta = torch.device("meta")
    if variant.startswith("single"):
        tables = [EmbeddingBagConfig(name=name, feature_names=[name], **common) for name in features]
        embeddings, sharder = EmbeddingBagCollection(tables, device=meta), AnyDeviceSharder()
    else:
        layers = [
            MultiLayerEmbeddingBagConfig(name=name, feature_names=[name], hidden_dim=case.hidden_dim, **common)
            for name in features
        ]
        embeddings = MultiLayerEmbeddingBagCollection(layers, device=meta)
        sharder = MultiLayerEmbeddingBagCollectionSharder(
            exchange="auto" if variant == "table_wise" else variant,
            pooling_factors={name: case.pooling_factor for name in features},
            local_batch_size=case.local_batch_size,
        )
    apply_optimizer_in_backward(torch.optim.SGD, embeddings.embedding_bags.parameters(), {"lr": 0.01})
    world_size = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    topology = Topology(world_size=world_size, local_world_size=local, compute_device=device.type)
    model = torch.nn.Sequential(embeddings)
    sharding = ParameterConstraints(sharding_types=["table_wise" if variant.endswith("table_wise") else "row_wise"])
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=case.local_batch_size, constraints=dict.fromkeys(features, sharding)
    )
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])


def batches(case: Case, count: int, device: torch.device) -> list[KeyedJaggedTensor]:
    """Return batches of this rank; Zipf ids have the exponent 1.05."""
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
    """Run one embedding step; the gradients of W2, which an optimizer would use, are dropped."""
    model(batch).values().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(case: Case, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure the times and bytes of all variants, which take turns."""
    models = {variant: build(variant, case, device) for variant in VARIANTS}
    data = batches(case, 4, device)
    sent = {}
    for variant, model in models.items():
        step(model, data[0])  # the first step also creates what is created lazily
        with count_traffic() as traffic:
            step(model, data[1])
        sent[variant] = traffic.vector_bytes
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for index in range(steps):
        for variant, model in models.items():
            synchronize(device)
            dist.barrier()
            started = time.perf_counter()
            step(model, data[index % len(data)])
            synchronize(device)
            seconds[variant].append(time.perf_counter() - started)
    median = {variant: statistics.median(times) * 1e3 for variant, times in seconds.items()}
    spread = {
        variant: [each * 1e3 for each in statistics.quantiles(times, n=4, method="inclusive")[::2]]
        for variant, times in seconds.items()
    }
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
    """Time the products with W2, forward and backward, of as many rows of each table as this rank has distinct ids."""
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
    """Wait for the device, if it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for every combination of the options."""
    for ids in args.ids:
        for hidden_dim in args.hidden_dim:
            for pooling_factor in args.pooling_factor:
                yield Case(
                    ids, hidden_dim, args.embedding_dim, args.batch, args.tables, args.num_embeddings, pooling_factor
                )


def show(result: dict[str, Any]) -> None:
    """Print one case as a table."""
    print(
        f"\n{result['ids']} ids, k {result['hidden_dim']}, d {result['embedding_dim']}, "
        f"pooling factor {result['pooling_factor']}: "
        f"local batch size {result['local_batch_size']}, {result['world_size']} ranks, {result['device']}"
    )
    print(f"{'':18}{'ms':>9}{'quartiles':>18}{'/ single':>10}{'MB sent':>10}")
    for variant in VARIANTS:
        median = result["median_ms"][variant]
        low, high = result["quartiles_ms"][variant]
        ratio = median / result["single_ms"]
        sent = result["output_bytes"][variant] / 1e6
        print(f"{variant:18}{median:9.1f}{f'{low:.1f} - {high:.1f}':>18}{ratio:10.2f}{sent:10.2f}")
    print(f"{'projection alone':18}{result['projection_floor_ms']:9.1f}", flush=True)


def at_least_one(text: str) -> int:
    """Parse a positive number, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return number


def main() -> None:
    """Start the ranks unless this process is one, run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks",
        type=at_least_one,
        default=2,
        help="local ranks, unless torchrun started this process (default %(default)s)",
    )
    parser.add_argument(
        "--batch", type=at_least_one, default=4096, help="bags of each feature on each rank (default %(default)s)"
    )
    parser.add_argument("--tables", type=at_least_one, default=26)
    parser.add_argument("--num-embeddings", type=at_least_one, default=100_000)
    parser.add_argument("--hidden-dim", type=int, nargs="+", default=[64])
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--ids", nargs="+", choices=["zipf", "uniform"], default=["zipf"])
    parser.add_argument("--pooling-factor", type=at_least_one, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=20)
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
