"""Write a checkpoint from all ranks, with checksums."""

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
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.utils.serialization import config as serialization

from mlet_dist.checkpoint.load import first_cause
from mlet_dist.checkpoint.manifest import Checksum, Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.errors import UserError, os_error

_TORCH_SAVE_OVERHEAD_BYTES = 2048  # at most, per tensor


def write_checkpoint(
    checkpoint: Checkpoint, state: dict[str, Any], about: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write ``state`` as ``checkpoint``, and complete it once every rank has finished. A collective call.

    Args:
        state: nested dicts of tensors, sharded or replicated on all ranks.
        about: further data for the manifest; those of rank 0 are used.
        group: a CPU process group of all ranks.

    Raises:
        UserError: on every rank: it cannot be written, for example because the disk is full. Its files are removed.
    """
    rank = dist.get_rank()
    needed = _total(written_bytes(state, rank), group)
    on_first_rank(lambda: _begin(checkpoint, needed), f"{checkpoint} cannot be written", group)
    writer = _ChecksumWriter(checkpoint)
    try:
        # torch.load ignores the checksums that torch.save would compute.
        with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        remove = partial(_remove_and_raise, checkpoint, needed, failed)
        on_first_rank(remove, f"{checkpoint} cannot be removed", group)  # raises on every rank
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, writer.files, group=group)
    files = {name: entry for each in found for name, entry in each.items()}
    manifest = Manifest(checkpoint.step, files, about)
    on_first_rank(lambda: checkpoint.finish(manifest), f"{checkpoint} cannot be written", group)


def _begin(checkpoint: Checkpoint, needed: int) -> None:
    free = checkpoint.store.free_bytes()
    if free is not None and free < needed:
        raise UserError(f"{checkpoint}: cannot be written: {_missing_space(needed, free)}")
    checkpoint.begin()


def _remove_and_raise(checkpoint: Checkpoint, needed: int, failed: CheckpointException) -> None:
    rank, (error, _) = next(iter(sorted(failed.failures.items())))
    with suppress(OSError):
        checkpoint.remove()
    message = f"{checkpoint}: rank {rank} cannot write it: {first_cause(error)}"
    free = checkpoint.store.free_bytes()
    cause = os_error(error)
    if free is not None and cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        message += f"; {_missing_space(needed, free)}"
    raise UserError(message)


def _missing_space(needed: int, free: int) -> str:
    missing = f"{needed - free:,} bytes are missing" if needed > free else "fewer were free while it was written"
    return f"it needs {needed:,} bytes and {free:,} are free: {missing}"


def _total(count: int, group: dist.ProcessGroup | None) -> int:
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count, group=group)
    return sum(counts)


def on_first_rank(action: Callable[[], None], failure: str, group: dist.ProcessGroup | None) -> None:
    """Run ``action`` on rank 0, and raise its error as a UserError on every rank. A collective call.

    Args:
        failure: the beginning of the message for errors other than UserError.
    """
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            message = [str(error)]
        except Exception as error:  # each fsspec implementation raises its own errors, and the other ranks wait
            message = [f"{failure}: {first_cause(error)}"]
    dist.broadcast_object_list(message, src=0, group=group)
    if message[0] is not None:
        raise UserError(message[0])


class _ChecksumWriter(dcp.FileSystemWriter):
    """DCP's writer of one file per rank, for any store, which records the checksums of the files that it writes.

    Attributes:
        files: file name -> its entry for the manifest.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path, sync_files=False)  # Checkpoint.open_new syncs the files
        self.files: dict[str, dict[str, Any]] = {}
        self.path = checkpoint.path
        self.fs = _ChecksumFileSystem(checkpoint, self.files)  # type: ignore[assignment]


class _ChecksumFileSystem(FileSystemBase):
    """The file system interface of DCP's writer, for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> None:
        self._checkpoint, self._files = checkpoint, files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        name = PurePosixPath(path).name
        with self._checkpoint.open_new(name) as file:
            stream = ChecksumStream(file)
            try:
                yield stream
            except Exception as error:  # torch.save's own error hides the file's
                raise stream.error or error from None
            self._files[name] = stream.checksum.entry()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        self._checkpoint.store.filesystem.mv(path, new_path)
        self._files[PurePosixPath(new_path).name] = self._files.pop(PurePosixPath(path).name)

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        """Do nothing: ``Checkpoint.begin`` has created the directory."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(self._checkpoint.store.filesystem.exists(path))

    def rm_file(self, path: Any) -> None:
        self._checkpoint.store.filesystem.rm_file(path)


class ChecksumStream(io.RawIOBase):
    """A sequential writer to ``file`` that computes its checksum. Closing the stream leaves the file open.

    Attributes:
        checksum: of the bytes written so far.
        error: the first error that the file raised.
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


def written_bytes(state: Any, rank: int) -> int:
    """Return the bytes of a checkpoint that count for ``rank``: its shards, and on rank 0 also the replicated tensors.

    The sum over all ranks is an upper bound of the checkpoint's size. DCP lets any rank write a replicated tensor.
    """
    if isinstance(state, dict):
        return sum(written_bytes(value, rank) for value in state.values())
    if isinstance(state, ShardedTensor):
        return sum(_saved_bytes(shard.tensor) for shard in state.local_shards())
    if isinstance(state, torch.Tensor):
        return _saved_bytes(state) if rank == 0 else 0
    return 0


def _saved_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _TORCH_SAVE_OVERHEAD_BYTES
