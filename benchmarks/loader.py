"""Compare the loader's rows per second with plain PyArrow and with TorchRec's in-memory Criteo pipeline.

    .venv/bin/python benchmarks/loader.py                      # on synthetic rows with Criteo's columns
    .venv/bin/python benchmarks/loader.py --data data/criteo --json    # on a prepared data set; the last line is JSON

One rank makes one pass over the training split, with all files in the page cache. The loaders take turns, and figures
are medians of the rounds. The time of a loader ends with its last batch and includes reading its files. TorchRec's
pipeline reads the same rows from uncompressed ``.npy`` files, which are written before.

- ``pyarrow`` decodes the same row groups in one thread and builds no batches.
- ``over_torchrec`` is ``in_order`` / ``torchrec``, where ``torchrec`` is an unchanged InMemoryBinaryCriteoIterDataPipe,
  which copies from the page cache to its memory and from there to batches.
- ``over_torchrec_from_disk`` compares one epoch from the disk, with the hashing that only TorchRec's pipeline needs
  (``loader_from_disk.py``).
- ``shuffled_over_torchrec`` compares both with shuffling: ours in a window, TorchRec's by a permutation of all rows.
- ``ns_per_row`` is a profile of one thread of the loader.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from loader_from_disk import ARRAYS, from_disk
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

from mlet_dist.data.loading.jagged_tensors import JaggedBuilder
from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.loading.order import Order, Shuffle
from mlet_dist.data.loading.row_groups import SplitRows
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.data.synthetic import synthesize

PROFILED_GROUPS = 8


def ours(data: Path, args: argparse.Namespace, shuffle: Shuffle | None) -> Iterable[Any]:
    """Return the loader as training uses it."""
    return DataLoader(
        data,
        "train",
        batch_size=args.batch_size,
        rank=0,
        world_size=1,
        dense_features=None,
        sparse_features=None,
        shuffle=shuffle,
        threads=args.threads,
    )


def torchrecs(arrays: Path, args: argparse.Namespace, shuffled: bool) -> Iterable[Any]:
    """Return TorchRec's pipeline, in order or with all rows shuffled."""
    files = [[str(arrays / f"{name}.npy")] for name in ARRAYS]
    return InMemoryBinaryCriteoIterDataPipe(
        "train", *files, args.batch_size, 0, 1, drop_last=True, shuffle_training_set=shuffled
    )


def write_arrays(data: Path, arrays: Path) -> None:
    """Write the training split as TorchRec's preprocessing does: row-major float32, int32 and int32 arrays."""
    schema = DatasetSchema.load(data)
    if len(schema.dense) != 13 or len(schema.sparse) != 26 or any(feature.multi_valued for feature in schema.sparse):
        sys.exit(f"{data}: TorchRec's pipeline needs exactly 13 dense and 26 single-valued features")
    table = pq.read_table([data / part.path for part in schema.parts["train"]])
    np.save(arrays / "dense.npy", np.stack([table[name].to_numpy() for name in schema.dense], axis=1))
    np.save(arrays / "sparse.npy", np.stack([table[f.name].to_numpy() for f in schema.sparse], axis=1))
    np.save(arrays / "labels.npy", table["label"].to_numpy().astype(np.int32).reshape(-1, 1))


def decode_all(data: Path) -> int:
    """Decode all row groups with PyArrow in one thread; return the number of rows."""
    rows = 0
    for part in DatasetSchema.load(data).parts["train"]:
        with pq.ParquetFile(data / part.path) as parquet:
            for group in range(parquet.num_row_groups):
                rows += parquet.read_row_group(group, use_threads=False).num_rows
    return rows


def rows_per_second(take: Callable[[], int]) -> float:
    """Return the rows per second of one call, which returns its number of rows."""
    started = time.perf_counter()
    rows = take()
    return rows / (time.perf_counter() - started)


def consume(batches: Callable[[], Iterable[Any]]) -> Callable[[], int]:
    """Return a function that iterates over the batches and counts their rows."""
    return lambda: sum(getattr(batch, "num_rows", len(batch.labels)) for batch in batches())


def profile(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the nanoseconds per row of each stage of the loader, in one thread."""
    schema = DatasetSchema.load(data)
    features = schema.parts["train"], schema.dense, tuple(schema.num_embeddings)
    parts, by_row = (SplitRows(data, schema, *features, by_row=shuffled) for shuffled in (False, True))
    found: dict[str, float] = {}

    def timed(stage: str, rows: int, work: Callable[[], Any]) -> Any:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            result = work()
            seconds.append(time.perf_counter() - started)
        found[stage] = min(seconds) / rows * 1e9
        return result

    groups = range(min(PROFILED_GROUPS, len(parts.group_rows)))
    rows = int(parts.group_rows[: len(groups)].sum())
    tables = timed("decode", rows, lambda: [parts.read(group) for group in groups])
    in_order = timed("check and lay out", rows, lambda: [parts.convert(group, tables[group]) for group in groups])
    jagged = JaggedBuilder(tuple(schema.num_embeddings), len(in_order[0]), weighted=parts.weighted)
    timed("KeyedJaggedTensor", rows, lambda: [jagged.build(rows_of_group) for rows_of_group in in_order])
    row_major = timed("lay out by row", rows, lambda: [by_row.convert(group, tables[group]) for group in groups])
    window = timed("join", rows, lambda: row_major[0].join(row_major[1:]))
    shuffle = Shuffle(0, rows)
    order = Order(
        parts.group_rows[: len(groups)],
        batch_size=min(args.batch_size, rows),
        rank=0,
        world_size=1,
        shuffle=shuffle,
    )
    first = next(order.windows(0, 0))
    picks = timed("order of a shuffled window", rows, lambda: list(order.picks(0, first)))
    timed("take shuffled rows", rows, lambda: [window.take(pick) for pick in picks])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a prepared data set with Criteo's columns (default: synthetic)")
    parser.add_argument("--rows", type=int, default=2_000_000, help="number of synthetic rows (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads of the loader (default %(default)s)")
    parser.add_argument("--shuffle-buffer", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data
        if data is None:
            data = Path(temporary) / "data"
            synthesize(data, rows=args.rows, num_embeddings=1_000_000)
        write_arrays(data, Path(temporary))
        shuffle = Shuffle(0, args.shuffle_buffer)
        loaders: dict[str, Callable[[], int]] = {
            "pyarrow": lambda: decode_all(data),
            "in_order": consume(lambda: ours(data, args, None)),
            "shuffled": consume(lambda: ours(data, args, shuffle)),
            "torchrec": consume(lambda: torchrecs(Path(temporary), args, shuffled=False)),
            "torchrec_shuffled": consume(lambda: torchrecs(Path(temporary), args, shuffled=True)),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, take in loaders.items():
                rates[name].append(rows_per_second(take))
        disk: dict[str, list[dict[str, float]]] = {"ours": [], "torchrec": []}
        for _ in range(args.rounds):
            for loader, runs in disk.items():
                runs.append(from_disk(loader, data, Path(temporary), args.batch_size, args.threads))
        stages = profile(data, args)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    for name, rate in medians.items():
        print(f"{name:18} {rate:14,.0f} rows/s   {min(rates[name]):14,.0f} to {max(rates[name]):,.0f}")
    from_disks = {
        f"{loader}_from_disk_{name}": statistics.median(run[name] for run in runs)
        for loader, runs in disk.items()
        for name in runs[0]
    }
    print("from disk: " + ", ".join(f"{name} {value:,.0f}" for name, value in from_disks.items()))
    print("one thread, ns per row: " + ", ".join(f"{stage} {cost:.0f}" for stage, cost in stages.items()))
    if args.json:
        result = {
            "batch_size": args.batch_size,
            "threads": args.threads,
            "cores": len(os.sched_getaffinity(0)),
            **{f"{name}_rows_per_s": round(rate) for name, rate in medians.items()},
            **{name: round(value) for name, value in from_disks.items()},
            "load_average": os.getloadavg()[0],
            "ns_per_row": {stage: round(cost, 1) for stage, cost in stages.items()},
            "shuffled_over_torchrec": medians["shuffled"] / medians["torchrec_shuffled"],
            "over_torchrec_from_disk": (
                from_disks["ours_from_disk_rows_per_s"] / from_disks["torchrec_from_disk_rows_per_s"]
            ),
            "rows_per_s": round(medians["in_order"]),
            "over_torchrec": medians["in_order"] / medians["torchrec"],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
