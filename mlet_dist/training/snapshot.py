"""What a checkpoint holds of a run, how a run is restored or rolled back from it, and a hash of its weights."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mlet_dist import __version__
from mlet_dist.checkpoint.load import (
    MODEL_KEY,
    OPTIMIZER_KEY,
    CompleteCheckpoint,
    latest_complete,
    load_model,
    load_state,
)
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.training.guard import NonFinite
from mlet_dist.training.optimizers import optimizer_state
from mlet_dist.training.state import Training

_METRICS_KEY, _RANDOM_KEY = "metrics", "rng"


def tensors_of(training: Training) -> dict[str, Any]:
    """All tensors of a run, by name, as they are: ``model``, ``optimizer``, ``metrics``, ``rng``. A collective call."""
    state = {
        MODEL_KEY: training.model.state_dict(),
        OPTIMIZER_KEY: optimizer_state(training.optimizer),
        _METRICS_KEY: training.metrics.state_dict(),
        _RANDOM_KEY: _random_state(),
    }
    return {key: value for key, value in state.items() if value}  # SGD has no state


def versions() -> dict[str, str]:
    """Of what the bits of a run depend on."""
    return {
        "mlet_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def restore(training: Training, found: CompleteCheckpoint) -> None:
    """Fill ``training`` from a whole checkpoint, in any sharding, on any number of ranks. A collective call.

    Random numbers go on only on as many ranks of the same kind: nothing that is trained depends on them but rows in
    half precision on CUDA, which are rounded stochastically.

    Raises:
        UserError: a tensor is missing, of another shape, or cannot be read.
    """
    location = found.checkpoint.location
    load_model(training.model, location)
    state = tensors_of(training)
    del state[MODEL_KEY]
    about = found.manifest.about
    alike = about["world_size"] == dist.get_world_size() and about["device"] == _device(training)
    if not alike:
        del state[_RANDOM_KEY]
    state[_METRICS_KEY]["loss"] = state[_METRICS_KEY]["loss"].new_zeros(about["world_size"])
    load_state(state, location)
    training.metrics.load_state_dict(state[_METRICS_KEY])
    if alike:
        _set_random_state(state[_RANDOM_KEY])
    training.step, training.skipped = found.manifest.step, about["skipped"]
    training.passed_over = set(about["passed_over"])


def about_ranks(training: Training) -> dict[str, Any]:
    """How many ranks write a checkpoint, and on what."""
    return {"world_size": dist.get_world_size(), "device": _device(training)}


def _device(training: Training) -> str:
    return next(training.model.parameters()).device.type


def _random_state() -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    state = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    rank = dist.get_rank()
    torch.set_rng_state(state[f"cpu.{rank}"])
    if f"cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"cuda.{rank}"])


def go_back(training: Training, store: CheckpointStore, error: NonFinite, limit: int) -> Mapping[str, Any]:
    """Take up the newest whole checkpoint; the batch of ``error`` is passed over from now on. A collective call.

    The batches between are trained again: the result is that of a run in which the one batch never came.

    Args:
        store: of this run, which saves nothing before its guard is settled.
        limit: how often a run may go back.

    Returns:
        What the checkpoint's manifest says of the run.

    Raises:
        NonFinite: the run has gone back as often as it may, or there is no checkpoint.
        UserError: each checkpoint is damaged.
    """
    if len(training.passed_over) >= limit:
        raise NonFinite(error.finding, f"the run has gone back {limit} times, as often as it may") from None
    found = latest_complete(store)
    if found is None:
        raise NonFinite(error.finding, f"{store} holds no checkpoint to go back to") from None
    # The checkpoint knows of none that were found after it was saved.
    passed_over = training.passed_over | {error.finding.step}
    restore(training, found)
    training.passed_over = passed_over
    return found.manifest.about


_BLOCK_BYTES = 64 << 20


def weights_sha256(model: nn.Module, device: torch.device) -> str:
    """SHA-256 over the names, dtypes, shapes and values of all full tensors, in name order; empty but on rank 0.

    Rank 0 receives the shards of the others in blocks of at most 64 MiB and never holds a whole table. A collective
    call, as long as it takes to send the model to one rank.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in _blocks_on_first_rank(tensor, device):
            digest.update(block.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest() if dist.get_rank() == 0 else ""


def _blocks_on_first_rank(tensor: torch.Tensor | ShardedTensor, device: torch.device) -> Iterator[torch.Tensor]:
    """The rows of a tensor in order, in blocks; the other ranks send theirs and get nothing."""
    rank = dist.get_rank()
    if not isinstance(tensor, ShardedTensor):
        if rank == 0:
            yield tensor.reshape(-1)
        return
    local = {shard.metadata.shard_offsets[0]: shard.tensor for shard in tensor.local_shards()}
    for metadata in sorted(tensor.metadata().shards_metadata, key=lambda shard: shard.shard_offsets[0]):
        rows, width = metadata.shard_sizes
        assert metadata.placement is not None
        owner = metadata.placement.rank()
        step = max(1, _BLOCK_BYTES // (width * tensor.dtype.itemsize))
        for start in range(0, rows, step):
            size = min(step, rows - start)
            if owner == rank:
                block = local[metadata.shard_offsets[0]][start : start + size].contiguous()
                if rank != 0:
                    dist.send(block, dst=0)
            elif rank == 0:
                block = torch.empty(size, width, dtype=tensor.dtype, device=device)
                dist.recv(block, src=owner)
            if rank == 0:
                yield block.reshape(-1)
