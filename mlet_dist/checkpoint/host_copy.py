"""What a checkpoint is written from: a copy of the state in host memory, or the state itself in small chunks."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

_CHUNK_BYTES = 64 << 20


def copy_to_cpu(state: Any) -> Any:
    """Return a copy of nested dicts of tensors in new host memory; the copy is finished on return.

    What is on a GPU passes through two pinned buffers of 64 MiB, so that it arrives at the speed of the link.
    """
    return _copied(state, _PinnedBuffers())


def _copied(state: Any, buffers: "_PinnedBuffers") -> Any:
    if isinstance(state, dict):
        return {key: _copied(value, buffers) for key, value in state.items()}
    if isinstance(state, ShardedTensor):
        metadata = state.metadata()
        shards = [
            ShardMetadata(each.shard_offsets, each.shard_sizes, _on_cpu(each)) for each in metadata.shards_metadata
        ]
        own = {tuple(each.shard_offsets): each for each in shards}
        copies = [
            Shard(buffers.copy(shard.tensor), own[tuple(shard.metadata.shard_offsets)])
            for shard in state.local_shards()
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            copies, replace(metadata, shards_metadata=shards), process_group=state._process_group
        )
    if isinstance(state, torch.Tensor):
        return buffers.copy(state)
    return state


def _on_cpu(shard: ShardMetadata) -> str:
    assert shard.placement is not None
    return f"rank:{shard.placement.rank()}/cpu"


class _PinnedBuffers:
    """Copies tensors from a GPU through two pinned buffers: while one is filled, the other is emptied."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor in pageable host memory."""
        source = source.detach()
        if not source.is_cuda or not source.is_contiguous() or source.nbytes < _CHUNK_BYTES:
            return source.to("cpu", copy=True)
        if not self._buffers:
            self._buffers = [torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        target = torch.empty(source.shape, dtype=source.dtype)
        flat, out = source.reshape(-1), target.reshape(-1)
        step = _CHUNK_BYTES // source.element_size()
        stream = torch.cuda.Stream(source.device)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        filled: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        for number, start in enumerate(range(0, flat.numel(), step)):
            part = flat[start : start + step]
            buffer = self._buffers[number % 2][: part.nbytes].view(part.dtype)
            with torch.cuda.stream(stream):
                buffer.copy_(part, non_blocking=True)
                done = stream.record_event()
            if filled is not None:
                _empty(*filled)
            filled = out[start : start + step], buffer, done
        if filled is not None:
            _empty(*filled)
        return target


def _empty(target: torch.Tensor, buffer: torch.Tensor, done: torch.cuda.Event) -> None:
    done.synchronize()
    target.copy_(buffer)


def in_chunks(state: Any) -> Any:
    """Return the same tensors, not copied, with shards of at most 64 MiB or one row.

    torch.distributed.checkpoint copies one shard at a time to host memory, and so needs no more than that for each.
    """
    if isinstance(state, dict):
        return {key: in_chunks(value) for key, value in state.items()}
    if not isinstance(state, ShardedTensor):
        return state
    metadata = state.metadata()
    size = metadata.tensor_properties.dtype.itemsize
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in state.local_shards()}
    shards: list[ShardMetadata] = []
    parts: list[Shard] = []
    for shard in metadata.shards_metadata:
        tensor = local.get(tuple(shard.shard_offsets))
        for start, rows in _cuts(shard, size):
            offsets = [shard.shard_offsets[0] + start, *shard.shard_offsets[1:]]
            part = ShardMetadata(offsets, [rows, *shard.shard_sizes[1:]], placement=shard.placement)
            shards.append(part)
            if tensor is not None:
                parts.append(Shard(tensor[start : start + rows], part))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        parts, replace(metadata, shards_metadata=shards), process_group=state._process_group
    )


def _cuts(shard: ShardMetadata, element_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the rows of each chunk of a shard."""
    rows, *others = shard.shard_sizes
    row_bytes = torch.Size(others).numel() * element_bytes
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    if rows <= step:
        yield 0, rows
        return
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def copied_bytes(state: Any) -> int:
    """Return the bytes that ``copy_to_cpu`` takes."""
    if isinstance(state, dict):
        return sum(map(copied_bytes, state.values()))
    if isinstance(state, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in state.local_shards())
    return state.nbytes if isinstance(state, torch.Tensor) else 0
