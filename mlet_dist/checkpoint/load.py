"""Finding a complete checkpoint, and loading what torch.distributed.checkpoint wrote in any sharding."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mlet_dist.checkpoint.manifest import Manifest, ManifestError
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.embeddings.collection import check_layers_fit
from mlet_dist.errors import UserError

MODEL_KEY, OPTIMIZER_KEY = "model", "optimizer"
_PROJECTION = re.compile(r"(?P<prefix>.*)projections\.(?P<table>[^.]+)\.weight")

Location = Path | str
"""A directory that DCP wrote, or its URL."""


def read_metadata(checkpoint: Location) -> Metadata:
    """Names, shapes and dtypes in a checkpoint.

    Raises:
        UserError: it is not a checkpoint, or a broken one.
    """
    try:
        return _reader(checkpoint).read_metadata()
    except Exception as error:  # unpickling a damaged file raises anything
        raise UserError(f"{checkpoint}: not a readable checkpoint: {error or type(error).__name__}") from None


def load_model(model: nn.Module, checkpoint: Location, key: str | None = MODEL_KEY) -> None:
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


def check_shapes(state: dict[str, Any], metadata: Metadata, checkpoint: Location, key: str | None) -> None:
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


def save_state(state: dict[str, Any], checkpoint: Location, no_dist: bool = False) -> None:
    """Write ``state`` as a checkpoint.

    Raises:
        UserError: a rank cannot write its part.
    """
    try:
        dcp.save(state, checkpoint_id=checkpoint, no_dist=no_dist)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(sorted(failed.failures.items())))
        raise UserError(f"{checkpoint}: rank {rank} cannot write it: {first_cause(error)}") from None


def load_state(state: dict[str, Any], checkpoint: Location, no_dist: bool = False) -> None:
    """Fill the tensors of ``state`` in place from a checkpoint.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    try:
        dcp.load(state, storage_reader=_reader(checkpoint), no_dist=no_dist)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(sorted(failed.failures.items())))
        raise UserError(f"{checkpoint}: rank {rank} cannot load it: {first_cause(error)}") from None


def load_tensor(name: str, checkpoint: Location, metadata: Metadata) -> torch.Tensor:
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


def first_cause(error: BaseException) -> str:
    """The first error of a chain in one line: torch.save's own says nothing of a full disk."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split()) or type(error).__name__


def _reader(checkpoint: Location) -> dcp.StorageReader:
    return FsspecReader(checkpoint) if "://" in str(checkpoint) else dcp.FileSystemReader(checkpoint)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, and what was wrong with those after it."""

    checkpoint: Checkpoint
    manifest: Manifest
    damage: list[str]


def newest_whole(store: CheckpointStore) -> Found | None:
    """The newest checkpoint that is whole; None where there is none at all. A collective call.

    All ranks read the files through, each a share of them. What was never finished does not count.

    Raises:
        UserError: there are checkpoints and each is damaged; the message names the files.
    """
    damage: list[str] = []
    steps = _of_first([each.step for each in store.checkpoints() if not each.is_being_written])
    for step in reversed(steps):
        manifest, found = _examine(store.checkpoint(step))
        if manifest is not None:
            return Found(store.checkpoint(step), manifest, damage)
        damage += found
    if damage:
        raise UserError(f"{store}: no checkpoint is whole: {'; '.join(damage)}")
    return None


def whole(checkpoint: Checkpoint) -> Found:
    """That checkpoint. A collective call.

    Raises:
        UserError: it is not whole; the message names the files.
    """
    manifest, damage = _examine(checkpoint)
    if manifest is None:
        raise UserError(f"the checkpoint is not whole: {'; '.join(damage)}")
    return Found(checkpoint, manifest, [])


def newest_checkpoint(store: CheckpointStore) -> Checkpoint:
    """The last checkpoint of a finished run. A collective call where there are several ranks.

    Raises:
        UserError: there is none, or it is damaged: an older one is not what the run came to.
    """
    found = newest_whole(store)
    if found is None:
        raise UserError(f"{store}: no whole checkpoint; the run never finished")
    if found.damage:
        raise UserError(f"the run's last checkpoint is damaged: {'; '.join(found.damage)}")
    return found.checkpoint


def newest_finished(store: CheckpointStore) -> tuple[Checkpoint, Manifest]:
    """The last checkpoint and what it says of itself; what is in its files is to be checked by whoever reads them.

    Raises:
        UserError: there is none, its manifest is damaged, or a file is missing or of another size.
    """
    finished = [each for each in store.checkpoints() if not each.is_being_written]
    if not finished:
        raise UserError(f"{store}: no whole checkpoint; the run never finished")
    newest = finished[-1]
    try:
        manifest = newest.manifest()
    except ManifestError as error:
        raise UserError(f"the run's last checkpoint is damaged: {error}") from None
    sizes = newest.sizes()
    for name, expected in sorted(manifest.files.items()):
        found = f"has {sizes[name]:,} bytes instead of {expected['bytes']:,}" if name in sizes else "is missing"
        if sizes.get(name) != expected["bytes"]:
            raise UserError(f"the run's last checkpoint is damaged: {newest}: {name} {found}")
    return newest, manifest


def _examine(checkpoint: Checkpoint) -> tuple[Manifest | None, list[str]]:
    """Its manifest, or what is wrong with it, a line each; every rank reads its share of the files."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    manifest = None
    try:
        manifest = checkpoint.manifest()
        names = sorted(manifest.files)[rank::world_size]
        damage = [f"{checkpoint}: {each}" for name in names if (each := manifest.find_damage(name, checkpoint.open))]
    except ManifestError as error:
        damage = [str(error)]
    damage = sorted({each for share in _from_all(damage) for each in share})
    return (None, damage) if damage else (manifest, [])


def _of_first(value: Any) -> Any:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _from_all(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
