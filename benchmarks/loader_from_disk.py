"""Read one epoch from disk with our loader or TorchRec's, each in its own process; `benchmarks/loader.py` uses this.

DLRM trains for one epoch, so that the work of a loader before its first batch counts as much as its batches. The time
of a loader therefore begins with its construction and ends with its last batch, in order, without the imports.
TorchRec's in-memory pipeline reads its ``.npy`` files and hashes the values into the tables (``hashes``, as in
TorchRec's own DLRM trainer). Our loader reads Parquet files, which contain ids already, and checks each id. The files
are dropped from the page cache before a process starts, so that both loaders read from the disk, as they would with a
data set larger than memory; the result contains the bytes that were read. Peak memory excludes that of the imports.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.schema import DatasetSchema

ARRAYS = ("dense", "sparse", "labels")


def from_disk(loader: str, data: Path, arrays: Path, batch_size: int, threads: int) -> dict[str, float]:
    """Run ``ours`` or ``torchrec``; return ``rows_per_s``, ``cpu_ns_per_row``, ``peak_mb`` and ``read_mb``."""
    for path in [*data.rglob("*.parquet"), *arrays.glob("*.npy")]:
        _drop_pages(path)
    command = [sys.executable, __file__, loader, str(data), str(arrays), str(batch_size), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _drop_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # a dirty page would not be dropped
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _batches(loader: str, data: Path, arrays: Path, batch_size: int, threads: int, sizes: list[int]) -> Iterable[Any]:
    if loader == "ours":
        return DataLoader(
            data,
            "train",
            batch_size=batch_size,
            rank=0,
            world_size=1,
            dense_features=None,
            sparse_features=None,
            threads=threads,
        )
    files = [[str(arrays / f"{name}.npy")] for name in ARRAYS]
    return InMemoryBinaryCriteoIterDataPipe("train", *files, batch_size, 0, 1, drop_last=True, hashes=sizes)


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _resident_bytes(key: str) -> int:
    # getrusage would also count the peak of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def main() -> None:
    """Measure one loader in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loader", choices=["ours", "torchrec"])
    for name, kind in (("data", Path), ("arrays", Path), ("batch_size", int), ("threads", int)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = list(DatasetSchema.load(args.data).num_embeddings.values())
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    memory, read = _resident_bytes("VmRSS"), _read_bytes()
    cpu, started = time.process_time(), time.perf_counter()
    batches = _batches(**vars(args), sizes=sizes)
    rows = sum(getattr(batch, "num_rows", len(batch.labels)) for batch in batches)
    found = {"rows_per_s": rows / (time.perf_counter() - started)}
    found["cpu_ns_per_row"] = (time.process_time() - cpu) / rows * 1e9
    found["peak_mb"] = (_resident_bytes("VmHWM") - memory) / (1 << 20)
    found["read_mb"] = (_read_bytes() - read) / (1 << 20)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
