"""Find a complete checkpoint, and load it under any sharding with torch.distributed.checkpoint."""

import re
from collections.abc import Mapping
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

from mlet_dist.checkpoint.long_work import Advance, run_long
from mlet_dist.checkpoint.manifest import Manifest, ManifestError
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.embeddings.multi_layer_tables import check_layers_fit
from mlet_dist.errors import UserError
from mlet_dist.models.spec import BAG_ROWS, SEQUENCE_ROWS
from mlet_dist.urls import is_url

MODEL_KEY, OPTIMIZER_KEY = "model", "optimizer"
_PROJECTION = re.compile(r"(?P<prefix>.*)projections\.(?P<table>[^.]+)\.weight")

Location = Path | str
"""A directory that torch.distributed.checkpoint wrote, or its URL."""


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A checkpoint whose files all match its manifest.

    Attributes:
        checkpoint: the checkpoint.
        manifest: its manifest.
        damage: descriptions of the damage to later checkpoints, which were skipped.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    damage: list[str]


def latest_complete(store: CheckpointStore) -> CompleteCheckpoint | None:
    """Return the latest complete checkpoint, or None if the store contains no finished one. A collective call.

    Each rank reads and verifies a share of the files. Unfinished checkpoints are ignored.

    Raises:
        UserError: all finished checkpoints are damaged; the message names the files.
    """
    damage: list[str] = []
    steps = _from_first_rank([each.step for each in store.checkpoints() if not each.is_unfinished])
    for step in reversed(steps):
        manifest, found = _verify(store.checkpoint(step))
        if manifest is not None:
            return CompleteCheckpoint(store.checkpoint(step), manifest, damage)
        damage += found
    if damage:
        raise UserError(f"{store}: no checkpoint is complete: {'; '.join(damage)}")
    return None


def latest_unverified(store: CheckpointStore) -> CompleteCheckpoint | None:
    """Return what ``latest_complete`` does, after comparing the sizes of files alone. A collective call.

    It is for callers that verify what they load (``verified_load``), so that no file is read twice.

    Raises:
        UserError: all finished checkpoints are damaged; the message names the files.
    """
    message, found = _from_first_rank(_latest_by_sizes(store) if _is_first_rank() else None)
    if message:
        raise UserError(message)
    return None if found is None else CompleteCheckpoint(store.checkpoint(found[0].step), *found)


def _latest_by_sizes(store: CheckpointStore) -> tuple[str, tuple[Manifest, list[str]] | None]:
    """Return an error message, or the latest checkpoint's manifest and the damage to later ones."""
    damage: list[str] = []
    try:
        for checkpoint in reversed([each for each in store.checkpoints() if not each.is_unfinished]):
            try:
                manifest = checkpoint.manifest()
            except ManifestError as error:
                damage.append(str(error))
                continue
            found = _damage_by_sizes(checkpoint, manifest)
            if not found:
                return "", (manifest, damage)
            damage += found
    except UserError as error:
        return str(error), None
    return f"{store}: no checkpoint is complete: {'; '.join(damage)}" if damage else "", None


def _damage_by_sizes(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    sizes, damage = checkpoint.sizes(), []
    for name, expected in sorted(manifest.files.items()):
        if sizes.get(name) != expected["bytes"]:
            found = f"has {sizes[name]:,} bytes instead of {expected['bytes']:,}" if name in sizes else "is missing"
            damage.append(f"{checkpoint}: {name} {found}")
    return damage


def require_complete(checkpoint: Checkpoint) -> CompleteCheckpoint:
    """Verify one checkpoint. A collective call.

    Raises:
        UserError: it is unfinished or damaged; the message names the files.
    """
    manifest, damage = _verify(checkpoint)
    if manifest is None:
        raise UserError(f"the checkpoint is not complete: {'; '.join(damage)}")
    return CompleteCheckpoint(checkpoint, manifest, [])


def latest_finished(store: CheckpointStore) -> tuple[Checkpoint, Manifest]:
    """Return the last checkpoint and its manifest after comparing file sizes alone; readers verify the checksums.

    Raises:
        UserError: there is no checkpoint, its manifest is damaged, or a file is missing or has another size.
    """
    finished = [each for each in store.checkpoints() if not each.is_unfinished]
    if not finished:
        raise UserError(f"{store}: no complete checkpoint; the run never finished")
    return finished[-1], finished_manifest(finished[-1], "the run's last checkpoint")


def finished_manifest(checkpoint: Checkpoint, name: str) -> Manifest:
    """Return the manifest of a checkpoint after comparing file sizes alone; readers verify the checksums.

    Args:
        checkpoint: must not be unfinished.
        name: what it is, for messages.

    Raises:
        UserError: its manifest is damaged, or a file is missing or has another size.
    """
    try:
        manifest = checkpoint.manifest()
    except ManifestError as error:
        raise UserError(f"{name} is damaged: {error}") from None
    damage = _damage_by_sizes(checkpoint, manifest)
    if damage:
        raise UserError(f"{name} is damaged: {damage[0]}")
    return manifest


def load_model(
    model: nn.Module, checkpoint: Location, key: str | None = MODEL_KEY, *, without: tuple[str, ...] = ()
) -> None:
    """Fill ``model``, sharded in any way over any number of ranks, from a checkpoint. A collective call.

    Args:
        key: the prefix of the model's names in the checkpoint; None if they have none, as in an export.
        without: prefixes of the names of tensors that stay as they are.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
    """
    state = model.state_dict()
    filled = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    check_shapes(filled, read_metadata(checkpoint), checkpoint, key)
    load_state(filled if key is None else {key: filled}, checkpoint)
    model.load_state_dict(state)


def load_state(state: dict[str, Any], checkpoint: Location, no_dist: bool = False) -> None:
    """Fill the tensors of ``state`` in place from a checkpoint. A collective call unless ``no_dist``.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    try:
        dcp.load(state, storage_reader=_reader(checkpoint), no_dist=no_dist)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(sorted(failed.failures.items())))
        raise UserError(f"{checkpoint}: rank {rank} cannot load it: {first_cause(error)}") from None


def read_metadata(checkpoint: Location) -> Metadata:
    """Return the names, shapes and dtypes of the tensors in a checkpoint.

    Raises:
        UserError: there is no checkpoint, or its metadata are damaged.
    """
    try:
        return _reader(checkpoint).read_metadata()
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UserError(f"{checkpoint}: not a readable checkpoint: {error or type(error).__name__}") from None


def check_shapes(
    state: dict[str, Any],
    metadata: Metadata,
    checkpoint: Location,
    key: str | None,
    rows_there: Mapping[str, int] | None = None,
) -> None:
    """Raise UserError unless the checkpoint contains every tensor of ``state`` with the same shape.

    ``rows_there`` has the rows that tensors have there, by name, where it is another number than in ``state``.
    """
    found: dict[str, torch.Size] = {}
    for name in state:
        tensor = metadata.state_dict_metadata.get(name if key is None else f"{key}.{name}")
        if not isinstance(tensor, TensorStorageMetadata):
            raise UserError(f"{checkpoint}: holds no tensor {name!r}, which the model has")
        found[name] = tensor.size
    for name, size in found.items():
        layer = _PROJECTION.fullmatch(name)
        names = (
            []
            if layer is None
            else [f"{layer['prefix']}{rows}.{layer['table']}.weight" for rows in (BAG_ROWS, SEQUENCE_ROWS)]
        )
        rows = next((found[each] for each in names if each in found), None)
        if layer is not None and rows is not None:  # the W2 of a range of rows has no W1 of its name
            try:
                check_layers_fit(layer["table"], rows, size)
            except ValueError as error:
                raise UserError(f"{checkpoint}: {error}") from None
    for name, size in found.items():
        wanted = state[name].size()
        if size != wanted and size != torch.Size(
            [(rows_there or {}).get(name, wanted[0] if wanted else 0), *wanted[1:]]
        ):
            shapes = f"{tuple(size)} in the checkpoint and {tuple(wanted)} in the model"
            raise UserError(f"{checkpoint}: {name!r} is {shapes}")


def first_cause(error: BaseException) -> str:
    """Return the message of the first error of a chain, in one line: torch.save's own error hides a full disk."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split()) or type(error).__name__


def _reader(checkpoint: Location) -> dcp.StorageReader:
    return FsspecReader(checkpoint) if is_url(str(checkpoint)) else dcp.FileSystemReader(checkpoint)


def _verify(checkpoint: Checkpoint) -> tuple[Manifest | None, list[str]]:
    """Read all files of a checkpoint, each rank its share; return its manifest, or None and the damage of all ranks."""
    manifest, damage = run_long(lambda advance: _verify_share(checkpoint, advance))
    damage = sorted({each for share in _from_all_ranks(damage) for each in share})
    return (None, damage) if damage else (manifest, [])


def _verify_share(checkpoint: Checkpoint, advance: Advance) -> tuple[Manifest | None, list[str]]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        manifest = checkpoint.manifest()
    except ManifestError as error:
        return None, [str(error)]
    names = sorted(manifest.files)[rank::world_size]
    found = [manifest.find_damage(name, checkpoint.open, advance) for name in names]
    return manifest, [f"{checkpoint}: {each}" for each in found if each]


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_first_rank(value: Any) -> Any:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _from_all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
