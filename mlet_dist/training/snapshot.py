"""What a checkpoint of a run holds, how a run is restored or rolled back from it, and a hash of its weights."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.utils import none_throws

from mlet_dist import __version__
from mlet_dist.checkpoint.load import (
    MODEL_KEY,
    OPTIMIZER_KEY,
    CompleteCheckpoint,
    latest_complete,
    load_model,
    load_state,
)
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.embeddings.row_order import ROW_ORDER, SPREAD
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.training.fused_optimizers import optimizer_state
from mlet_dist.training.job import Job
from mlet_dist.training.model_plan import ModelPlan
from mlet_dist.training.non_finite_guard import NonFinite
from mlet_dist.training.refitted_tables import RefittedTables
from mlet_dist.training.reporting import Recorder, TrainingReport
from mlet_dist.training.state import Training

_METRICS_KEY, _RANDOM_KEY = "metrics", "rng"
_BLOCK_BYTES = 64 << 20


def state_to_save(training: Training) -> dict[str, Any]:
    """Return all tensors of a run, not copied: ``model``, ``optimizer``, ``metrics``, ``rng``. A collective call."""
    state = {
        MODEL_KEY: training.model.state_dict(),
        OPTIMIZER_KEY: optimizer_state(training.optimizer),
        _METRICS_KEY: training.metrics.state_dict(),
        _RANDOM_KEY: _random_state(),
    }
    return {key: value for key, value in state.items() if value}  # SGD has no state


def manifest_fields(
    job: Job, plan: ModelPlan, recorder: Recorder, report: TrainingReport, training: Training
) -> dict[str, Any]:
    """Return what a checkpoint's manifest holds beside the list of files."""
    return {
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        RUN_ID: job.run.run_id,
        **rank_info(training),
        "skipped": training.skipped,
        "passed_over": sorted(training.excluded_steps),
        "data": job.loader.state_dict(training.step),
        "records": recorder.size,
        "report": report.state_dict(),
        "identity": job.identity,
        "spec": job.spec.to_dict(),
        "config": job.config.to_dict(),
        "plan": plan.entries(),
        ROW_ORDER: SPREAD,
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that a run's exact results depend on."""
    return {
        "mlet_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
    }


def restore(training: Training, found: CompleteCheckpoint, tables: RefittedTables | None = None) -> None:
    """Load a complete checkpoint into ``training``, in any sharding, on any number of ranks. A collective call.

    Args:
        training: what is restored.
        found: the checkpoint.
        tables: its tables, if rows have other widths now. Rows that are stored by id there are converted without them.

    Random states are restored only on the same number of ranks and the same kind of device. Training depends on them
    only for half-precision rows on CUDA, which are rounded stochastically.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
    """
    location = found.checkpoint.location
    tables = tables or RefittedTables.of_rows_by_id(found.checkpoint, found.manifest)
    load_model(training.model, location, without=None if tables is None else TABLES_PREFIX)
    state = state_to_save(training)
    del state[MODEL_KEY]
    if tables is not None:
        states = state.get(OPTIMIZER_KEY, {})
        tables.load(training.model, states)
        if states:
            state[OPTIMIZER_KEY] = {name: of for name, of in states.items() if not name.startswith(TABLES_PREFIX)}
    about = found.manifest.about
    same_ranks = about["world_size"] == dist.get_world_size() and about["device"] == _device(training)
    if not same_ranks:
        del state[_RANDOM_KEY]
    state[_METRICS_KEY]["loss"] = state[_METRICS_KEY]["loss"].new_zeros(about["world_size"])
    load_state(state, location)
    training.metrics.load_state_dict(state[_METRICS_KEY])
    if same_ranks:
        _set_random_state(state[_RANDOM_KEY])
    training.step, training.skipped = found.manifest.step, about["skipped"]
    training.excluded_steps = set(about["passed_over"])


def rank_info(training: Training) -> dict[str, Any]:
    """Return the world size and the device type that a checkpoint is written on."""
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


def roll_back(training: Training, store: CheckpointStore, error: NonFinite, limit: int) -> Mapping[str, Any]:
    """Restore the latest complete checkpoint, and exclude the batch of ``error`` from now on. A collective call.

    The batches in between are trained again: the result is that of a run that never saw the excluded batch.

    Args:
        training: the state to roll back.
        store: the run's checkpoints; none was saved after the batch, because the guard is flushed before saving.
        error: what was found.
        limit: how often a run may be rolled back.

    Returns:
        The fields of the checkpoint's manifest.

    Raises:
        NonFinite: the run was rolled back ``limit`` times already, or there is no checkpoint.
        UserError: every checkpoint is damaged.
    """
    if len(training.excluded_steps) >= limit:
        raise NonFinite(
            error.finding, f"the run was rolled back {limit} times, and train.non_finite_limit allows no more"
        ) from None
    found = latest_complete(store)
    if found is None:
        raise NonFinite(error.finding, f"{store} holds no checkpoint to roll back to") from None
    # The checkpoint does not hold steps that were excluded after it was saved.
    excluded_steps = training.excluded_steps | {error.finding.step}
    restore(training, found)
    training.excluded_steps = excluded_steps
    return found.manifest.about


def weights_sha256(model: nn.Module, device: torch.device) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of all full tensors in name order; "" on other ranks.

    The hash does not depend on the sharding. Rank 0 receives the shards of the other ranks in blocks of at most 64 MiB
    and never holds a full table. A collective call, which takes as long as sending the model to one rank.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in _blocks_on_rank_0(tensor, device):
            digest.update(block.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest() if dist.get_rank() == 0 else ""


def _blocks_on_rank_0(tensor: torch.Tensor | ShardedTensor, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor in order, in blocks, on rank 0; the other ranks send theirs and yield nothing."""
    rank = dist.get_rank()
    if not isinstance(tensor, ShardedTensor):
        if rank == 0:
            yield tensor.reshape(-1)
        return
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in tensor.local_shards()}
    shards = sorted(tensor.metadata().shards_metadata, key=lambda shard: tuple(shard.shard_offsets))
    # Shards side by side, which split a tensor by columns, are sent together.
    for _, group in groupby(shards, key=lambda shard: shard.shard_offsets[0]):
        beside = list(group)
        rows, width = beside[0].shard_sizes[0], sum(shard.shard_sizes[1] for shard in beside)
        step = max(1, _BLOCK_BYTES // (width * tensor.dtype.itemsize))
        for start in range(0, rows, step):
            size = min(step, rows - start)
            parts = []
            for shard in beside:
                owner = none_throws(shard.placement).rank()
                if owner == rank:
                    block = local[tuple(shard.shard_offsets)][start : start + size].contiguous()
                    if rank != 0:
                        dist.send(block, dst=0)
                elif rank == 0:
                    block = torch.empty(size, shard.shard_sizes[1], dtype=tensor.dtype, device=device)
                    dist.recv(block, src=owner)
                if rank == 0:
                    parts.append(block)
            if rank == 0:
                yield torch.cat(parts, dim=1).reshape(-1)
