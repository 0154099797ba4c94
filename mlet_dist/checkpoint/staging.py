"""A copy of what is to be saved, so that training may go on while it is written."""

from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor


def staged(state: Any) -> Any:
    """The same nested dicts, of tensors copied to memory of their own on the CPU; the copy is done on return."""
    if isinstance(state, dict):
        return {key: staged(value) for key, value in state.items()}
    if isinstance(state, ShardedTensor):
        shards = state.local_shards()
        if any(shard.tensor.device.type != "cpu" for shard in shards):
            return state.cpu()
        copies = [Shard(shard.tensor.detach().clone(), shard.metadata) for shard in shards]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            copies, state.metadata(), process_group=state._process_group
        )
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    return state


def staged_bytes(state: Any, rank: int) -> int:
    """Bytes that this rank adds to a checkpoint: of what all ranks hold, the first writes the only copy."""
    if isinstance(state, dict):
        return sum(staged_bytes(value, rank) for value in state.values())
    if isinstance(state, ShardedTensor):
        return sum(_written(shard.tensor) for shard in state.local_shards())
    if isinstance(state, torch.Tensor):
        return _written(state) if rank == 0 else 0
    return 0


_BYTES_OF_A_RECORD = 2048  # what torch.save puts around a tensor, at most


def _written(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _BYTES_OF_A_RECORD
