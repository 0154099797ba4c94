"""Finding a checkpoint that is whole: every file there, and every checksum right."""

from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.manifest import Manifest, ManifestError
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.errors import UserError


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
