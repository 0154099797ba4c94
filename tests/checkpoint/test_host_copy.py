"""What a checkpoint is written from: a copy if the host has room for it, otherwise the state in chunks."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from mlet_dist.checkpoint import host_copy, saver
from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.verified_load import load_verified
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.multirank

Ranks = Callable[..., RankPool]
ROWS, WIDTH, CHUNK_BYTES = 1003, 5, 2000


def _sharded(whole: torch.Tensor) -> tuple[ShardedTensor, torch.Tensor]:
    """Return a tensor sharded by rows, and this rank's rows, which lie in a larger tensor like those of a kernel."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = [ROWS * each // world for each in range(world + 1)]
    own = torch.empty(2 * len(whole), WIDTH)[bounds[rank] : bounds[rank + 1]]
    own.copy_(whole[bounds[rank] : bounds[rank + 1]])
    shards = [
        ShardMetadata([start, 0], [stop - start, WIDTH], f"rank:{number}/cpu")
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    of_all = ShardedTensorMetadata(shards, whole.size(), TensorProperties(dtype=whole.dtype))
    local = [Shard(own, shards[rank])]
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, of_all), own


def _save(directory: Path, memory: int) -> dict[str, Any]:
    whole = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    sharded, own = _sharded(whole)
    before = own.clone()
    copies = 0

    def counting(state: Any) -> Any:
        nonlocal copies
        copies += 1
        return host_copy.copy_to_cpu(state)

    store, warnings = CheckpointStore(directory), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "_CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr(saver, "copy_to_cpu", counting)
        patch.setattr(saver, "memory_bytes", lambda: (memory, memory))
        patch.setattr(saver, "print_warning", warnings.append)
        with CheckpointSaver(store, timedelta(seconds=60), 9, None) as writer:
            for step, in_background in ((1, True), (2, False), (3, True)):
                own.copy_(before + step)
                state = {"model": {"w": sharded}, "number": torch.tensor(float(step))}
                writer.save(step, state, {}, in_background=in_background)
                own.fill_(-1)  # as training does, as soon as it is allowed to
                writer.wait()
    for step in (1, 2, 3):
        checkpoint = store.checkpoint(step)
        found, number = torch.empty(ROWS, WIDTH), torch.tensor(0.0)
        load_verified({"model": {"w": found}, "number": number}, checkpoint, checkpoint.manifest())
        assert torch.equal(found, whole + step)
        assert number == step
    return {"copies": copies, "warnings": warnings}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_room_for_a_copy_training_waits_and_a_warning_says_so(
    ranks: Ranks, tmp_path: Path, world_size: int
) -> None:
    for name, memory, copies in (("room", 1 << 30, 2), ("none", 20_000, 0)):
        found = ranks(world_size).run(_save, tmp_path / name, memory)
        assert [each["copies"] for each in found] == [copies] * world_size
        first, *others = (each["warnings"] for each in found)
        assert not any(others)
        assert len(first) == (copies == 0)  # once
        assert all("a host would need" in line and "train.checkpoint_async=false" in line for line in first)


def _largest_chunk() -> tuple[int, int]:
    sharded, own = _sharded(torch.zeros(ROWS, WIDTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "_CHUNK_BYTES", CHUNK_BYTES)
        chunks = host_copy.in_chunks(sharded)
    parts = [shard.tensor for shard in chunks.local_shards()]
    assert all(part.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for part in parts)  # not copied
    assert len(chunks.metadata().shards_metadata) >= len(parts)
    return max(part.nbytes for part in parts), sum(part.nbytes for part in parts) - own.nbytes


def test_chunks_are_small_and_not_copied(ranks: Ranks) -> None:
    for largest, missing in ranks(3).run(_largest_chunk):
        assert largest <= CHUNK_BYTES
        assert missing == 0
