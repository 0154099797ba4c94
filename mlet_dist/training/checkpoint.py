"""Checkpoints with torch.distributed.checkpoint: sharded in, resharded out, whole or absent."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchrec.optim.keyed import KeyedOptimizer

from mlet_dist.embeddings.multi_layer import check_layers_fit
from mlet_dist.errors import UserError
from mlet_dist.training.optimizers import optimizer_state

FORMAT_VERSION = 1
MODEL_KEY, OPTIMIZER_KEY = "model", "optimizer"
_PROJECTION = re.compile(r"(?P<prefix>.*)projections\.(?P<table>[^.]+)\.weight")


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: KeyedOptimizer, progress: dict[str, Any]
) -> Path:
    """Write ``directory/step-<step>`` from all ranks: ``model``, ``optimizer``, ``progress`` and ``format_version``.

    It is written under another name and renamed once every rank has finished. A collective call; ``directory`` is
    one place for all ranks.

    Raises:
        UserError: it cannot be written, for example because the disk is full; nothing is left of it.
    """
    target = directory / f"step-{step:08d}"
    partial = directory / f"step-{step:08d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {
        MODEL_KEY: model.state_dict(),
        OPTIMIZER_KEY: optimizer_state(optimizer),
        "progress": progress,
        "format_version": FORMAT_VERSION,
    }
    try:
        save_state(state, partial)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if dist.get_rank() == 0:
        partial.rename(target)
    dist.barrier()
    return target


def newest_checkpoint(directory: Path) -> Path:
    """The last whole checkpoint in a run's ``checkpoints`` directory.

    Raises:
        UserError: there is none.
    """
    whole = sorted(path.parent for path in directory.glob("step-????????/.metadata"))
    if not whole:
        raise UserError(f"{directory}: no whole checkpoint; the run never finished")
    return whole[-1]


def read_metadata(checkpoint: Path) -> Metadata:
    """Names, shapes and dtypes in a checkpoint.

    Raises:
        UserError: it is not a checkpoint, or a broken one.
    """
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # unpickling a damaged file raises anything
        raise UserError(f"{checkpoint}: not a readable checkpoint: {error or type(error).__name__}") from None


def load_model(model: nn.Module, checkpoint: Path, key: str | None = MODEL_KEY) -> None:
    """Fill ``model``, sharded in any way on any number of ranks, from a checkpoint.

    Args:
        key: what precedes the model's names in the checkpoint; None where nothing does (an export).

    Raises:
        UserError: a tensor is missing, of another shape, or cannot be read.
    """
    state = model.state_dict()
    check_shapes(state, read_metadata(checkpoint), checkpoint, key)
    load_state(state if key is None else {key: state}, checkpoint)
    model.load_state_dict(state)


def check_shapes(state: dict[str, Any], metadata: Metadata, checkpoint: Path, key: str | None) -> None:
    """Raise UserError unless the checkpoint holds every tensor of ``state`` in the same shape."""
    found: dict[str, torch.Size] = {}
    for name in state:
        tensor = metadata.state_dict_metadata.get(name if key is None else f"{key}.{name}")
        if not isinstance(tensor, TensorStorageMetadata):
            raise UserError(f"{checkpoint}: holds no tensor {name!r}, which the model has")
        found[name] = tensor.size
    for name, size in found.items():
        layer = _PROJECTION.fullmatch(name)
        if layer is not None:
            try:
                check_layers_fit(
                    layer["table"], found[f"{layer['prefix']}embedding_bags.{layer['table']}.weight"], size
                )
            except ValueError as error:
                raise UserError(f"{checkpoint}: {error}") from None
    for name, size in found.items():
        if size != state[name].size():
            shapes = f"{tuple(size)} there and {tuple(state[name].size())} in the model"
            raise UserError(f"{checkpoint}: {name!r} is {shapes}")


def save_state(state: dict[str, Any], checkpoint: Path, no_dist: bool = False) -> None:
    """Write ``state`` as a checkpoint.

    Raises:
        UserError: a rank cannot write its part.
    """
    try:
        dcp.save(state, checkpoint_id=checkpoint, no_dist=no_dist)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(sorted(failed.failures.items())))
        raise UserError(f"{checkpoint}: rank {rank} cannot write it: {_cause(error)}") from None


def load_state(state: dict[str, Any], checkpoint: Path, no_dist: bool = False) -> None:
    """Fill the tensors of ``state`` in place from a checkpoint.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=no_dist)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(sorted(failed.failures.items())))
        raise UserError(f"{checkpoint}: rank {rank} cannot load it: {_cause(error)}") from None


def load_tensor(name: str, checkpoint: Path, metadata: Metadata) -> torch.Tensor:
    """One whole tensor of the model, on the CPU, read by this process alone.

    Raises:
        UserError: the tensor is missing or its file damaged.
    """
    found = metadata.state_dict_metadata.get(f"{MODEL_KEY}.{name}")
    if not isinstance(found, TensorStorageMetadata):
        raise UserError(f"{checkpoint}: holds no tensor {name!r}")
    tensor = torch.empty(found.size, dtype=found.properties.dtype)
    load_state({MODEL_KEY: {name: tensor}}, checkpoint, no_dist=True)
    return tensor


def _cause(error: BaseException) -> str:
    """The first error of a chain in one line: torch.save's own says nothing of a full disk."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split()) or type(error).__name__
