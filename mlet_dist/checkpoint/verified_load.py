"""Load a checkpoint into tensors of any sharding, and verify what is read: no file is read twice."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mlet_dist.checkpoint.long_work import Advance, run_long
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.checkpoint.tensor_ranges import DcpFiles
from mlet_dist.errors import UserError

_THREADS = 4
_TASK_BYTES = 32 << 20
_BYTES_OF_THREAD = 128 << 20


@dataclass(frozen=True)
class _Task:
    """Rows to read.

    Attributes:
        name: of the tensor.
        row, column: where the target begins in the full tensor.
        target: ``(rows, columns)`` or ``(rows,)``; of any number of dimensions if it is ``whole``.
        whole: whether the target is all of a tensor.
    """

    name: str
    row: int
    column: int
    target: torch.Tensor
    whole: bool = False


def load_verified(state: Mapping[str, Any], checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Fill the tensors of ``state`` in place, in any sharding on any number of ranks. A collective call.

    Each rank reads what it has of the tensors, with up to four threads, and compares the checksum of each block of a
    file with the manifest's before it uses the block. No rank waits long in one collective, however slow the others
    read.

    Args:
        state: nested dicts of tensors, sharded or the same on all ranks.
        checkpoint: where they are.
        manifest: of the checkpoint.

    Raises:
        UserError: on every rank: a tensor is missing or has another shape, or a file is missing or damaged.
    """
    run_long(lambda advance: _load(dict(_flat(state, "")), checkpoint, manifest, advance))


def _flat(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors by the names that torch.distributed.checkpoint gives them."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@torch.no_grad()
def _load(tensors: Mapping[str, Any], checkpoint: Checkpoint, manifest: Manifest, advance: Advance) -> None:
    files = DcpFiles(checkpoint.location, checkpoint.open, manifest.files)
    advance()
    tasks: list[_Task] = []
    for name, tensor in tensors.items():
        _check_shape(name, tensor, files)
        tasks += _tasks(name, tensor, files)
    tasks.sort(key=lambda task: files.position(task.name, task.row))
    total = sum(task.target.nbytes for task in tasks)
    threads = max(1, min(_THREADS, total // _BYTES_OF_THREAD))
    shares: list[list[_Task]] = [[] for _ in range(threads)]
    read = 0
    for task in tasks:
        shares[min(threads - 1, read * threads // max(1, total))].append(task)
        read += task.target.nbytes
    with ThreadPoolExecutor(threads, thread_name_prefix="mlet-restore") as pool:
        for each in [pool.submit(_read_share, files.separate(), share, advance) for share in shares]:
            each.result()


def _check_shape(name: str, tensor: Any, files: DcpFiles) -> None:
    found = files.tensors.get(name)
    if found is None:
        raise UserError(f"{files.location}: holds no tensor {name!r}")
    size = tuple(tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.size())
    if found.shape != size:
        raise UserError(f"{files.location}: {name!r} is {found.shape} in the checkpoint and {size} in this run")


def _tasks(name: str, tensor: torch.Tensor | ShardedTensor, files: DcpFiles) -> Iterator[_Task]:
    if not isinstance(tensor, ShardedTensor):
        if tensor.dim() in (1, 2) and tensor.numel():
            yield from _cut(name, 0, 0, tensor.detach(), files)
        elif tensor.numel():
            yield _Task(name, 0, 0, tensor.detach(), whole=True)
        return
    for shard in tensor.local_shards():
        if shard.tensor.numel():
            row, *column = shard.metadata.shard_offsets
            yield from _cut(name, row, column[0] if column else 0, shard.tensor.detach(), files)


def _cut(name: str, row: int, column: int, target: torch.Tensor, files: DcpFiles) -> Iterator[_Task]:
    """Yield rows that are in one file each, so that no file is opened again and read twice."""
    step = max(1, _TASK_BYTES // max(1, target.nbytes // len(target)))
    stop = row + len(target)
    firsts = files.first_rows(name, row, stop)
    for first, end in zip(firsts, [*firsts[1:], stop], strict=True):
        for start in range(first, end, step):
            yield _Task(name, start, column, target[start - row : min(start + step, end) - row])


def _read_share(files: DcpFiles, tasks: list[_Task], advance: Advance) -> None:
    """Read tasks in the order of the files, so that each block is read once."""
    with closing(files):
        for task in tasks:
            target, dtype = task.target, files.tensors[task.name].dtype
            if task.whole:
                target.copy_(files.load(task.name))
            elif target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
                files.read_rows(task.name, task.row, target, task.column)
            else:
                rows = torch.empty(target.shape, dtype=dtype)
                files.read_rows(task.name, task.row, rows, task.column)
                target.copy_(rows)
            advance()
