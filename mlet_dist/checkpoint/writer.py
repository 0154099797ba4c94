"""Writing a checkpoint from all ranks."""

import errno
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.utils.serialization import config as serialization

from mlet_dist.checkpoint.load import first_cause
from mlet_dist.checkpoint.manifest import Checksum, Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.errors import UserError, os_error


def write_checkpoint(
    checkpoint: Checkpoint, state: dict[str, Any], about: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write ``state`` as ``checkpoint``, and mark it whole once every rank has finished. A collective call.

    Args:
        state: nested dicts of tensors, sharded or the same on all ranks.
        about: goes into the manifest; that of the first rank counts.
        group: all ranks; on the CPU.

    Raises:
        UserError: it cannot be written, for example because the disk is full; nothing is left of it. On every rank.
    """
    rank = dist.get_rank()
    needed = _total(staged_bytes(state, rank), group)
    on_first(lambda: _begin(checkpoint, needed), f"{checkpoint} cannot be written", group)
    writer = _Writer(checkpoint)
    try:
        # torch.save would sum up each tensor once more, for a checksum that torch.load does not look at.
        with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        clear = partial(_clear, checkpoint, needed, failed)
        on_first(clear, f"{checkpoint} cannot be removed", group)  # it raises, on every rank
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, writer.files, group=group)
    files = {name: entry for each in found for name, entry in each.items()}
    whole = Manifest(checkpoint.step, files, about)
    on_first(lambda: checkpoint.finish(whole), f"{checkpoint} cannot be written", group)


def _begin(checkpoint: Checkpoint, needed: int) -> None:
    free = checkpoint.store.free_bytes()
    if free is not None and free < needed:
        raise UserError(f"{checkpoint}: cannot be written: {_missing(needed, free)}")
    checkpoint.begin()


def _clear(checkpoint: Checkpoint, needed: int, failed: CheckpointException) -> None:
    rank, (error, _) = next(iter(sorted(failed.failures.items())))
    with suppress(OSError):
        checkpoint.remove()
    said = f"{checkpoint}: rank {rank} cannot write it: {first_cause(error)}"
    free = checkpoint.store.free_bytes()
    cause = os_error(error)
    if free is not None and cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        said += f"; {_missing(needed, free)}"
    raise UserError(said)


def _missing(needed: int, free: int) -> str:
    missing = f"{needed - free:,} bytes are missing" if needed > free else "which was less while it was written"
    return f"it needs {needed:,} bytes and {free:,} are free: {missing}"


def _total(count: int, group: dist.ProcessGroup | None) -> int:
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count, group=group)
    return sum(counts)


def on_first(action: Callable[[], None], failure: str, group: dist.ProcessGroup | None) -> None:
    """Have the first rank do something, and every rank raise what it raises, after the words of ``failure``."""
    said: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            said = [str(error)]
        except Exception as error:  # each store has errors of its own; the other ranks wait
            said = [f"{failure}: {first_cause(error)}"]
    dist.broadcast_object_list(said, src=0, group=group)
    if said[0] is not None:
        raise UserError(said[0])


class _Writer(dcp.FileSystemWriter):
    """DCP's writer of one file a rank, into any store, which notes the checksum of what it writes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path, sync_files=False)  # the files sync themselves
        self.files: dict[str, dict[str, Any]] = {}
        self.path = checkpoint.path
        self.fs = _Files(checkpoint, self.files)  # type: ignore[assignment]


class _Files(FileSystemBase):
    """What DCP's writer asks of a file system, for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, sums: dict[str, dict[str, Any]]) -> None:
        self._checkpoint, self._sums = checkpoint, sums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        name = PurePosixPath(path).name
        with self._checkpoint.open_new(name) as file:
            stream = SummedStream(file)
            try:
                yield stream
            except Exception as error:  # torch.save's own says nothing of what the file said
                raise stream.error or error from None
            self._sums[name] = stream.checksum.entry()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        self._checkpoint.store.filesystem.mv(path, new_path)
        self._sums[PurePosixPath(new_path).name] = self._sums.pop(PurePosixPath(path).name)

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        """``Checkpoint.begin`` has made it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(self._checkpoint.store.filesystem.exists(path))

    def rm_file(self, path: Any) -> None:
        self._checkpoint.store.filesystem.rm_file(path)


class SummedStream(io.RawIOBase):
    """A file that is written from its beginning to its end; closing it leaves the file open.

    Attributes:
        error: the first that the file raised.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.checksum = file, Checksum()
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except Exception as error:
            self.error = self.error or error
            raise
        before = self.checksum.size
        self.checksum.update(data)
        return self.checksum.size - before

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.checksum.size

    def flush(self) -> None:
        self._file.flush()


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
