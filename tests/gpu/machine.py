"""The machine that the checks run on: its device, the rank processes, and the software that it has."""

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankPool

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "mlet-dist")
_START_S = 300.0  # a rank that is not forked imports torch and TorchRec, and CUDA loads its kernels when they are used


class NotHere(Exception):
    """A check cannot run on this machine; the message says why."""


@dataclass
class Machine:
    """The device (cpu or cuda) and the numbers of ranks to check; closes its rank processes at the end of a block."""

    device: str
    world_sizes: Sequence[int]
    _pools: dict[int, RankPool] = field(default_factory=dict)

    def __enter__(self) -> "Machine":
        self._folder = tempfile.TemporaryDirectory(prefix="mlet-gpu-")
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()
        self._folder.cleanup()

    @property
    def largest(self) -> int:
        """The largest number of ranks."""
        return max(self.world_sizes)

    @property
    def folder(self) -> Path:
        """An empty directory for each caller."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    @property
    def pools(self) -> Callable[..., RankPool]:
        """As the fixture ``ranks`` of the tests: ``pools(2).run(function, *arguments)``."""
        return self._pool

    def _pool(self, world_size: int, local_world_size: int | None = None) -> RankPool:
        assert local_world_size in (None, world_size), "this machine is one node"
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size, device=self.device, timeout_s=_START_S)
        return self._pools[world_size]

    def needs_cuda(self, why: str) -> None:
        """Raise NotHere on a CPU."""
        if self.device != "cuda":
            raise NotHere(f"needs a GPU: {why}")

    @cached_property
    def small_run(self) -> tuple[str, ...]:
        """The settings of a run of a few seconds on a synthetic data set, which is made here."""
        data = self.folder / "data"
        command = [sys.executable, "-m", "mlet_dist", "synth", "--out", data, "--rows", 6001, "--num-embeddings", 300]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, capture_output=True, timeout=300)
        return (
            f"data.path={data}",
            "data.batch_size=96",
            "data.eval_batch_size=240",
            "model.bottom_mlp=[16]",
            "model.top_mlp=[16]",
            "model.embedding_dim=4",
            "model.hidden_dim=12",
            "optimizer.name=adagrad",
            "optimizer.learning_rate=0.05",
            "train.max_steps=24",
            "train.log_every=8",
            "train.deterministic=true",
        )


def description(device: str) -> dict[str, Any]:
    """Return the versions of the software and the names of the GPUs, as plain data."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if device == "cuda":
        found |= {
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        }
    return found
