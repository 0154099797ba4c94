"""A fingerprint of a sharded model's weights that does not depend on how they are sharded."""

import hashlib
from collections.abc import Iterator

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

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
