"""Runs `mlet train` within the tests' ranks, where a run takes one second instead of ten."""

import gc
import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrec.distributed import comm

from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankPool, rank_backend, rank_device

Ranks = Callable[..., RankPool]

_STORES = tempfile.TemporaryDirectory()  # the file of a process group is needed for as long as the group
_numbers = count()


def train_in_ranks(ranks: Ranks, world_size: int | tuple[int, ...], *overrides: str) -> dict[str, Any]:
    """Return the summary of a run of as many ranks, with ``weights_sha256``; (4, 2) are 4 ranks on 2 "nodes"."""
    pool = ranks(*world_size) if isinstance(world_size, tuple) else ranks(world_size)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = f"file://{_STORES.name}/{next(_numbers)}"
    result: dict[str, Any] = pool.run(_train, overrides, port, group)[0]
    return result


def _train(overrides: Sequence[str], port: int, group: str) -> dict[str, Any]:
    from mlet_dist.config.config_file import load_config
    from mlet_dist.training.trainer import train

    _leave_group()  # training joins ranks itself
    os.environ["MASTER_PORT"] = str(port)
    try:
        overrides = [*overrides, f"train.device={rank_device().type}"]
        return train(load_config(ROOT / "configs" / "criteo_kaggle.yaml", overrides))
    finally:
        # Training unfroze what the fork server had frozen, and the next run would look at all of it.
        gc.collect(1)
        gc.freeze()
        _leave_group()
        # By a file, because a port that was free before may be taken by now.
        dist.init_process_group(
            rank_backend(), init_method=group, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )


def _leave_group() -> None:
    # TorchRec keeps the groups of nodes for as long as the process lives, and those of another world are of no use.
    comm._INTRA_PG = comm._CROSS_PG = None
    if dist.is_initialized():
        dist.destroy_process_group()


def stopped_after(step: int, run: Path, copy: Path) -> Path:
    """Return a copy of ``run`` as if it had been killed soon after it was saved at ``step``."""
    copy.mkdir()
    for name in (".mlet-run", "config.yaml", "model.json", "metrics.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    source = run / "checkpoints" / f"step-{step:08d}"
    target = copy / "checkpoints" / source.name
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return copy


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] != "timing"]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in kept]


def tensors(run: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Return all of a checkpoint's model and optimizer, by PyTorch's own conversion, which shares no code with ours."""
    file = scratch / f"{run.name}.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}", file)
    found = torch.load(file, weights_only=False)
    return dict(_flat({key: found.get(key, {}) for key in ("model", "optimizer")}, ""))


def _flat(state: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if not isinstance(state, dict):
        return [(name, state)]
    return [each for key, value in state.items() for each in _flat(value, f"{name}/{key}")]
