"""Compare saving and loading a checkpoint with writing and reading plain files, and measure what async saves cost.

    .venv/bin/python benchmarks/checkpoint.py --ranks 2 --out DIR         # DIR is on the disk to measure
    torchrun ... benchmarks/checkpoint.py --json --out DIR                # on any ranks; the last line is a JSON object

The checkpoint is that of a DLRM. In each round, the checkpoint is written (with fsync and checksums), each rank writes
a plain file of as many bytes as its own (with fsync), the checkpoint is verified and loaded, and each rank reads its
plain file. Reads come from the page cache unless the machine allows this process to drop it. Times are those of the
slowest rank; ratios are the median over rounds of the ratio of the two times of one round.

Then training steps are timed, with one checkpoint in every --every steps. Rounds without checkpoints, with
asynchronous ones, and with ones that training waits for, take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor

from mlet_dist.checkpoint.host_copy import copy_to_cpu
from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, latest_complete, load_state
from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.writer import write_checkpoint
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.schema import SparseFeature
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer, optimizer_state
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.process_group import Worker, join_ranks
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer

TABLES, DENSE = 26, 13
MODES = ("none", "async", "sync")


def seconds(action: Callable[[], object]) -> float:
    """Return how long the slowest rank takes."""
    dist.barrier()
    started = time.perf_counter()
    action()
    spent = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def write_plain(path: Path, size: int) -> None:
    """Write a file of ``size`` bytes, in blocks of 4 MiB."""
    block = os.urandom(1 << 22)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """Read a file from its beginning to its end, in blocks of 4 MiB."""
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass


def drop_page_cache() -> bool:
    """Drop the page cache, so that the next reads come from the disk; return False if that is not allowed."""
    dist.barrier()
    allowed = [False]
    if dist.get_rank() == 0:
        try:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("1")
            allowed = [True]
        except OSError:
            pass
    dist.broadcast_object_list(allowed)
    return allowed[0]


def bandwidths(state: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Return the GB/s of all ranks together, and the ratios of times."""
    rank = dist.get_rank()
    store, plain = CheckpointStore(folder / "checkpoints"), folder / f"plain-{rank}"
    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "verify": [], "read": [], "stage": []}
    size, cold = 0, True
    for step in range(rounds):
        checkpoint = store.checkpoint(step)
        times["stage"].append(seconds(partial(copy_to_cpu, state)))
        times["save"].append(seconds(partial(write_checkpoint, checkpoint, state, {})))
        files = checkpoint.manifest().files
        size = sum(entry["bytes"] for entry in files.values())
        own = sum(entry["bytes"] for name, entry in files.items() if name.startswith(f"__{rank}_"))
        times["write"].append(seconds(partial(write_plain, plain, own)))
        cold = drop_page_cache() and cold
        times["verify"].append(seconds(partial(latest_complete, store)))
        times["load"].append(times["verify"][-1] + seconds(partial(load_state, state, checkpoint.location)))
        cold = drop_page_cache() and cold
        times["read"].append(seconds(partial(read_plain, plain)))
        if rank == 0:
            checkpoint.remove()
    plain.unlink()
    found: dict[str, Any] = {"bytes": size, "reads_from_disk": cold}
    found |= {f"{what}_gb_per_s": size / 1e9 / min(spent) for what, spent in times.items()}
    for what, baseline in (("save", "write"), ("load", "read")):
        pairs = zip(times[what], times[baseline], strict=True)
        found[f"{what}_over_{baseline}"] = statistics.median(ours / plain for ours, plain in pairs)
    return found


def step_times(
    training: Training, state: Callable[[], dict[str, Any]], arguments: argparse.Namespace, folder: Path, worker: Worker
) -> dict[str, Any]:
    """Return the seconds of a step in each mode, and their ratio to those without checkpoints."""
    guard = Guard(training, worker.device, "stop", 0)
    timer = StepTimer(training.model, worker.device, arguments.local_batch_size)
    spent: dict[str, list[float]] = {mode: [] for mode in MODES}
    batch = _batch(arguments)
    stalls: list[float] = []
    with CheckpointSaver(CheckpointStore(folder / "steps"), timedelta(minutes=10), 1, None) as saver:
        for _ in range(arguments.rounds + 1):
            for mode in MODES:

                def run(mode: str = mode) -> None:
                    batches = iter([batch] * arguments.every)
                    steps = take_steps(training, batches, worker.device, guard, timer, pipelined=False)
                    for step, _ in enumerate(steps):
                        if step == 0 and mode != "none":
                            started = time.perf_counter()
                            saver.save(1, state(), {})
                            stalls.append(time.perf_counter() - started)
                            if mode == "sync":
                                saver.wait()

                spent[mode].append(seconds(run))
                saver.wait()
    none = spent["none"][1:]
    found = {f"step_seconds_{mode}": statistics.median(times[1:]) / arguments.every for mode, times in spent.items()}
    for mode in ("async", "sync"):
        found[f"{mode}_over_none"] = statistics.median(
            ours / plain for ours, plain in zip(spent[mode][1:], none, strict=True)
        )
    return found | {"stall_seconds": statistics.median(stalls), "steps_between_checkpoints": arguments.every}


def _batch(arguments: argparse.Namespace) -> Batch:
    size = arguments.local_batch_size
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = torch.randint(arguments.num_embeddings, (TABLES * size,), generator=generator)
    lengths = torch.ones(TABLES * size, dtype=torch.int64)
    sparse = KeyedJaggedTensor([f"C{index}" for index in range(TABLES)], values, lengths=lengths, stride=size)
    labels = torch.randint(2, (size,), generator=generator).float()
    return Batch(torch.rand(size, DENSE, generator=generator), sparse, labels, size, size * dist.get_world_size())


def measure(arguments: argparse.Namespace, worker: Worker) -> dict[str, Any]:
    """Measure a DLRM with Adagrad, whose optimizer state is as large as its rows."""
    folder = Path(arguments.out) / "benchmark-checkpoint"
    if worker.is_first:
        folder.mkdir(parents=True)
    dist.barrier()
    tables = tuple(SparseFeature(f"C{index}", arguments.num_embeddings) for index in range(TABLES))
    spec = ModelSpec(ModelConfig(hidden_dim=64), tuple(f"I{index}" for index in range(DENSE)), tables, seed=0)
    config = OptimizerConfig("adagrad", 0.01)
    model = build_training_model(spec, torch.device("meta"))
    fuse_row_optimizer(model, config)
    sharded, _ = shard_model(model, worker, arguments.local_batch_size)
    optimizer = build_optimizer(sharded, config)

    def state() -> dict[str, Any]:
        return {MODEL_KEY: sharded.state_dict(), OPTIMIZER_KEY: optimizer_state(optimizer)}

    try:
        found = bandwidths(state(), folder, arguments.rounds)
        training = Training(
            sharded,
            optimizer,
            BinaryMetrics(worker.device),
            steps=1,
            batches_per_epoch=1,
            batch_size=1,
            rows_per_epoch=1,
        )
        found |= step_times(training, state, arguments, folder, worker)
    finally:
        dist.barrier()
        if worker.is_first:
            shutil.rmtree(folder)
    return {"ranks": worker.world_size, "num_embeddings": arguments.num_embeddings, **found}


def main() -> None:
    """Parse the options, start the ranks if --ranks is given, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=".", help="an existing directory on the disk to measure (default: the current one)"
    )
    parser.add_argument(
        "--ranks", type=int, help="the number of gloo ranks to start (default: the ranks of torchrun, or one)"
    )
    parser.add_argument(
        "--num-embeddings",
        type=int,
        default=20_000,
        help="rows of each of the 26 tables of 64 columns (default %(default)s)",
    )
    parser.add_argument("--local-batch-size", type=int, default=2048)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.ranks is not None:
        rest = sys.argv[1:]
        at = rest.index("--ranks")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        sys.exit(subprocess.call([*command, str(arguments.ranks), __file__, *rest[:at], *rest[at + 2 :]]))
    warnings.filterwarnings("ignore")
    with join_ranks("cpu") as worker:
        found = measure(arguments, worker)
    if worker.is_first:
        print(json.dumps(found) if arguments.json else "\n".join(f"{key:28} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
