"""Compare the step time that the planner predicts with that of real steps, on local gloo ranks.

    .venv/bin/python benchmarks/plan_accuracy.py                     # 1, 2, 4 and 8 ranks; the last line is JSON
    .venv/bin/python benchmarks/plan_accuracy.py --ranks 2 --rounds 5

For each number of ranks, all ranks take turns, in every round, at measuring rates as `mlet doctor --distributed
--calibrate` does and at whole steps of training: TorchRec's pipeline, loss, backward and update. Predictions use the
medians of the rounds' rates, so that a load on the machine that lasts affects both alike. Nothing is fitted to the
steps that are predicted. Batches are in memory, so the loader is not part of a step.
"""

import argparse
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor

from mlet_dist.cli.process import configure_torch
from mlet_dist.cluster.calibration import calibrate
from mlet_dist.config.calibration_file import Calibration, GroupRates
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.planning.cost_model import Device
from mlet_dist.embeddings.planning.plan_cost import slowest_step
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.planner.expected_step import expected_step
from mlet_dist.planner.hardware_rates import build_device
from mlet_dist.planner.plan_inputs import presets
from mlet_dist.planner.run_plan import predicted_step
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.process_group import Worker, join_ranks
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import pipeline_is_faster, take_steps
from mlet_dist.training.timing import StepTimer

# The sizes of Criteo Kaggle's tables with frequent values only, roughly.
SIZES = (
    1_400, 550, 140_000, 60_000, 300, 20, 11_700, 630, 4, 38_000, 5_100, 120_000, 3_200, 27, 11_000, 95_000, 11, 4_700,
    2_000, 4, 110_000, 18, 16, 52_000, 90, 36_000,
)  # fmt: skip
HIDDEN_DIM, EMBEDDING_DIM, LAYERS = 64, 16, (512, 256)
ZIPF = 1.05
NOT_TIMED = 4


class Run:
    """A model that trains on batches of one size, and its plan."""

    def __init__(self, local_batch_size: int, worker: Worker) -> None:
        self.local_batch_size, self._worker, self.times = local_batch_size, worker, list[float]()
        layers = ModelConfig(embedding_dim=EMBEDDING_DIM, hidden_dim=HIDDEN_DIM, bottom_mlp=LAYERS, top_mlp=LAYERS)
        features = tuple(SparseFeature(f"C{index}", rows) for index, rows in enumerate(SIZES, 1))
        spec = ModelSpec(layers, tuple(f"I{index}" for index in range(1, 14)), features, seed=0)
        model, config = build_training_model(spec, torch.device("meta")), OptimizerConfig(learning_rate=0.01)
        fuse_row_optimizer(model, config)
        self.tables = model.sparse_arch.embedding_bag_collection.row_tables()
        sharded, self.plan = shard_model(model, worker, local_batch_size, dense_columns=len(spec.dense))
        sharded.train()
        training = Training(
            sharded, build_optimizer(sharded, config), BinaryMetrics(worker.device), steps=1, batches_per_epoch=1,
            batch_size=1, rows_per_epoch=1,
        )  # fmt: skip
        guard, timer = Guard(training, worker.device, "stop", 0), StepTimer(sharded, worker.device, local_batch_size)
        batches = cycle(self._batches([feature.name for feature in features]))
        self._steps = take_steps(training, batches, worker.device, guard, timer, pipelined=pipeline_is_faster(worker))

    def measure(self, seconds: float) -> None:
        """Take steps for some seconds, and keep the median milliseconds of a step."""
        found = list[float]()
        for _ in islice(self._steps, NOT_TIMED):
            pass
        dist.barrier()
        # All ranks must take equally many steps.
        started = time.perf_counter()
        next(self._steps)
        count = torch.tensor(max(4, round(seconds / (time.perf_counter() - started))))
        dist.all_reduce(count, dist.ReduceOp.MIN)
        for _ in range(int(count)):
            started = time.perf_counter()
            next(self._steps)
            found.append(1e3 * (time.perf_counter() - started))
        self.times.append(statistics.median(found))

    def _batches(self, names: Sequence[str]) -> Iterator[Batch]:
        generator, size = torch.Generator().manual_seed(self._worker.rank), self.local_batch_size
        for _ in range(4):
            ids = [
                torch.multinomial(torch.from_numpy(weights(rows)), size, replacement=True, generator=generator)
                for rows in SIZES
            ]
            sparse = KeyedJaggedTensor(
                list(names),
                torch.cat(ids),
                lengths=torch.ones(size * len(names), dtype=torch.int64),
                stride=size,
                length_per_key=[size] * len(names),
                offset_per_key=[size * index for index in range(len(names) + 1)],
            )
            dense = torch.rand(size, 13, generator=generator)
            labels = torch.randint(0, 2, (size,), generator=generator).float()
            yield Batch(dense, sparse, labels, size, size * self._worker.world_size)


def weights(rows: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return how often each id of a table occurs, relative to the others."""
    return np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF


def median_of(found: Sequence[Calibration]) -> Calibration:
    """Return the medians of several calibrations of the same ranks."""
    numbers = {
        field.name: statistics.median(getattr(each, field.name) for each in found)
        for field in dataclasses.fields(Calibration)
        if field.type in (float, "float")
    }
    groups = tuple(
        GroupRates(
            same[0].collective,
            same[0].ranks,
            same[0].nodes,
            statistics.median(each.latency_us for each in same),
            statistics.median(each.gbs for each in same),
        )
        for same in zip(*(each.groups for each in found), strict=True)
    )
    return dataclasses.replace(found[0], **numbers, groups=groups)


def predicted_ms(run: Run, device: Device) -> dict[str, Any]:
    """Return the predicted milliseconds of a step, by part, for ids of this benchmark."""
    counts = {f"C{index}": (1e9 * weights(rows)).astype(np.int64) for index, rows in enumerate(SIZES, 1)}
    plan, expected = run.plan, expected_step(run.plan, run.tables, counts, device)
    _, found = slowest_step(expected.costs(plan.tables), plan.dense, device, expected.busiest)
    return predicted_step(found, device) | {"busiest_owner": expected.busiest}


def measure(args: argparse.Namespace, worker: Worker) -> list[dict[str, Any]]:
    """Measure and predict the steps of each batch size."""
    runs, calibrations = [Run(batch, worker) for batch in args.batch], list[Calibration]()
    for _ in range(args.rounds):
        calibrations.append(calibrate(worker))
        for run in runs:
            run.measure(args.seconds)
    device = build_device(presets()["cpu"], "fp32", median_of(calibrations))
    found = []
    for run in runs:
        predicted, measured = predicted_ms(run, device), statistics.median(run.times)
        found.append(
            {
                "ranks": worker.world_size,
                "local_batch_size": run.local_batch_size,
                "predicted_ms": predicted,
                "measured_ms": measured,
                "measured_by_round_ms": run.times,
                "predicted_over_measured": predicted["total"] / measured,
            }
        )
    return found


def show(result: dict[str, Any]) -> None:
    """Print one case as a line."""
    predicted = result["predicted_ms"]
    parts = " + ".join(f"{name} {predicted[name]:.1f}" for name in _PARTS)
    print(
        f"{result['ranks']} ranks, {result['local_batch_size']:5} rows each: predicted {predicted['total']:.1f} ms, "
        f"measured {result['measured_ms']:.1f} ms, ratio {result['predicted_over_measured']:.2f}   ({parts})",
        flush=True,
    )


_PARTS = ("latency", "network", "memory", "compute", "host", "skew")


def main() -> None:
    """Run each number of ranks in processes of its own, unless this process is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024], help="rows on each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of steps, for each batch size in each round")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each rank (default %(default)s)")
    args = parser.parse_args()
    configure_torch()
    if "RANK" in os.environ:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        with join_ranks("cpu") as worker:
            for result in measure(args, worker):
                if worker.is_first:
                    show(result)
                    print(json.dumps(result), flush=True)
        return
    cases = []
    for ranks in args.ranks:
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launch, os.path.abspath(__file__), *sys.argv[1:]]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                cases.append(json.loads(line))
            else:
                print(line, flush=True)
    ratios = [each["predicted_over_measured"] for each in cases]
    within = all(1 / 1.5 <= ratio <= 1.5 for ratio in ratios)
    print(json.dumps({"cases": cases, "lowest_ratio": min(ratios), "highest_ratio": max(ratios), "within_1.5": within}))


if __name__ == "__main__":
    main()
