"""The fingerprint of a model's weights: rows are hashed by the ranks that own them, and digests alone are gathered."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.utils import none_throws

from mlet_dist.checkpoint.long_work import Advance, collective_device, run_long

_BLOCK_BYTES = 1 << 20
_BLOCKS_PER_COPY = 32
_BLOCKS_PER_ROUND = 64
_THREADS = 4
_DIGEST_BYTES = 32


def weights_sha256(model: nn.Module) -> str:
    """Return a SHA-256 of the names, dtypes, shapes and values of a model's full tensors, on every rank.

    A tensor is cut into blocks of rows, 1 MiB each, whose boundaries do not depend on the sharding. The SHA-256 of the
    tensors' names, dtypes, shapes and of the blocks' digests, in the order of names and rows, is the result. So it is
    the same for any sharding and any number of ranks. A rank hashes the blocks that it owns where they lie. Only blocks
    of which several ranks have a part are sent, to one of these ranks. A collective call.
    """
    rank = dist.get_rank()
    tensors = [_Blocks(name, tensor, rank) for name, tensor in sorted(model.state_dict().items())]
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + tensor.count)
    digests = torch.zeros(starts[-1], _DIGEST_BYTES, dtype=torch.uint8)
    for tensor, start, stop in zip(tensors, starts, starts[1:], strict=False):
        tensor.hash_shared(digests[start:stop])
    run_long(lambda advance: _hash_own(tensors, digests, starts, advance))
    gathered = digests.view(torch.int64).to(collective_device())  # each block's digest is zero on all ranks but one
    dist.all_reduce(gathered)
    digests = gathered.cpu().view(torch.uint8)
    found = hashlib.sha256()
    for tensor, start, stop in zip(tensors, starts, starts[1:], strict=False):
        found.update(f"{tensor.name} {tensor.dtype} {tuple(tensor.size)}\n".encode())
        found.update(digests[start:stop].numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class _Part:
    """Rows and columns of a tensor that one rank has: a shard, or the part of a shard in a block."""

    rank: int
    first_row: int
    stop_row: int
    first_column: int
    stop_column: int

    def rows(self, first_row: int, stop_row: int) -> "_Part":
        first, stop = max(self.first_row, first_row), min(self.stop_row, stop_row)
        return _Part(self.rank, first, stop, self.first_column, self.stop_column)


class _Blocks:
    """The blocks of a tensor, and who hashes them.

    Args:
        name: of the tensor in the state dict.
        tensor: sharded by rows, by columns, or both; or the same on all ranks, so that rank 0 hashes it.
        rank: this rank.

    Attributes:
        size, dtype: of the full tensor.
        count: the number of blocks.
    """

    def __init__(self, name: str, tensor: torch.Tensor | ShardedTensor, rank: int) -> None:
        self.name, self._rank = name, rank
        if isinstance(tensor, ShardedTensor):
            self.size, self.dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
        else:
            self.size, self.dtype = tensor.size(), tensor.dtype
        self._rows, *others = self.size or (1,)
        self._width = torch.Size(others).numel()
        self._row_bytes = self._width * self.dtype.itemsize
        self._block_rows = max(1, _BLOCK_BYTES // max(1, self._row_bytes))
        self.count = -(-self._rows // self._block_rows) if self._width else 0
        if isinstance(tensor, ShardedTensor):
            # A rank without rows may have a shard of size 0.
            shards = [each for each in tensor.metadata().shards_metadata if torch.Size(each.shard_sizes).numel()]
            self._parts = sorted(map(_part_of, shards), key=lambda part: (part.first_row, part.first_column))
            self._local = {
                _part_of(shard.metadata): shard.tensor.detach()
                for shard in tensor.local_shards()
                if shard.tensor.numel()
            }
        else:
            self._parts = [_Part(0, 0, self._rows, 0, self._width)]
            self._local = {self._parts[0]: tensor.detach().reshape(self._rows, self._width)} if rank == 0 else {}
        self._first_rows = [part.first_row for part in self._parts]
        self._stop_rows = [part.stop_row for part in self._parts]  # ascending, since parts side by side have equal rows

    def own(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yield the rows of runs of blocks that this rank has all of, the first block's number, and that of blocks."""
        for part, rows in self._local.items():
            if self._is_narrow(part):
                continue
            first = -(-part.first_row // self._block_rows)
            stop = self.count if part.stop_row == self._rows else part.stop_row // self._block_rows
            for block in range(first, stop, _BLOCKS_PER_COPY):
                blocks = min(_BLOCKS_PER_COPY, stop - block)
                begin = block * self._block_rows - part.first_row
                yield rows[begin : begin + blocks * self._block_rows], block, blocks

    def hash_shared(self, digests: torch.Tensor) -> None:
        """Hash the blocks of which several ranks have a part; ``digests`` are those of the tensor. A collective call.

        Each block is sent to one of the ranks that have a part of it.
        """
        for blocks in self._rounds:
            sent: dict[int, list[torch.Tensor]] = {}
            received: list[tuple[int, list[_Part]]] = []
            for block in blocks:
                first, stop = block * self._block_rows, min((block + 1) * self._block_rows, self._rows)
                parts = self._parts[bisect_right(self._stop_rows, first) : bisect_left(self._first_rows, stop)]
                owner = parts[block % len(parts)].rank
                for shard in self._local:
                    if shard.first_row < stop and first < shard.stop_row:
                        sent.setdefault(owner, []).append(self._bytes_of(shard, first, stop))
                if owner == self._rank:
                    received.append((block, [part.rows(first, stop) for part in parts]))
            expected = [(part.rank, self._size_of(part)) for _, parts in received for part in parts]
            pieces = iter(_exchange(sent, expected))
            for block, parts in received:
                rows = self._block(block, [(part, next(pieces)) for part in parts])
                digests[block] = _digest(rows)

    @property
    def block_bytes(self) -> int:
        """The bytes of a block."""
        return self._block_rows * self._row_bytes

    @cached_property
    def _rounds(self) -> list[list[int]]:
        """The blocks of which several ranks have a part, in rounds that bound what is sent at once."""
        if not any(self._is_narrow(part) for part in self._parts):
            borders = {part.first_row // self._block_rows for part in self._parts if part.first_row % self._block_rows}
            return [sorted(borders)] if borders else []
        step = _BLOCKS_PER_ROUND * len(self._parts)
        return [list(range(block, min(block + step, self.count))) for block in range(0, self.count, step)]

    def _is_narrow(self, part: _Part) -> bool:
        return part.stop_column - part.first_column < self._width

    def _size_of(self, part: _Part) -> int:
        columns = part.stop_column - part.first_column
        return (part.stop_row - part.first_row) * columns * self.dtype.itemsize

    def _bytes_of(self, shard: _Part, first_row: int, stop_row: int) -> torch.Tensor:
        part = shard.rows(first_row, stop_row)
        return _as_bytes(self._local[shard][part.first_row - shard.first_row : part.stop_row - shard.first_row])

    def _block(self, block: int, pieces: list[tuple[_Part, torch.Tensor]]) -> torch.Tensor:
        """Return the bytes of a block, put together."""
        first = block * self._block_rows
        rows = min(self._block_rows, self._rows - first)
        whole = torch.empty(rows, self._row_bytes, dtype=torch.uint8)
        for part, piece in pieces:
            columns = slice(*(each * self.dtype.itemsize for each in (part.first_column, part.stop_column)))
            whole[part.first_row - first : part.stop_row - first, columns] = piece.view(
                part.stop_row - part.first_row, -1
            )
        return whole


def _part_of(shard: ShardMetadata) -> _Part:
    (first_row, *first_column), (rows, *columns) = shard.shard_offsets, shard.shard_sizes
    column, width = (first_column[0], columns[0]) if columns else (0, 1)
    return _Part(none_throws(none_throws(shard.placement).rank()), first_row, first_row + rows, column, column + width)


def _exchange(sent: dict[int, list[torch.Tensor]], expected: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Send bytes to each rank, and return the pieces that were received. A collective call.

    Args:
        sent: what goes to each rank.
        expected: the sender and the bytes of each piece, in the order of the result.
    """
    ranks, device = range(dist.get_world_size()), collective_device()
    pieces = [torch.cat(sent.get(rank, [torch.empty(0, dtype=torch.uint8)])) for rank in ranks]
    sizes = [sum(size for rank, size in expected if rank == sender) for sender in ranks]
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(pieces).to(device), sizes, [len(piece) for piece in pieces])
    of_sender = received.cpu().split(sizes)
    found, offsets = [], [0] * len(ranks)
    for sender, size in expected:
        found.append(of_sender[sender][offsets[sender] : offsets[sender] + size])
        offsets[sender] += size
    return found


def _hash_own(tensors: list[_Blocks], digests: torch.Tensor, starts: list[int], advance: Advance) -> None:
    """Hash the blocks that this rank has all of, in threads: hashlib and copies from devices release Python's lock."""
    buffers: SimpleQueue[torch.Tensor | None] = SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(None)  # allocated when a tensor on a device needs it

    def hash_run(tensor: _Blocks, start: int, rows: torch.Tensor, first: int, blocks: int) -> None:
        buffer = buffers.get()
        try:
            if rows.is_cuda:
                if buffer is None or len(buffer) < rows.numel() * rows.element_size():
                    size = max(_BLOCKS_PER_COPY * tensor.block_bytes, rows.numel() * rows.element_size())
                    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                target = buffer[: rows.numel() * rows.element_size()].view(rows.dtype).view(rows.shape)
                rows = target.copy_(rows)
            content = _as_bytes(rows)
            for block in range(blocks):
                own = content[block * tensor.block_bytes : (block + 1) * tensor.block_bytes]
                digests[start + first + block] = _digest(own)
        finally:
            buffers.put(buffer)
        advance()

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mlet-fingerprint") as pool:
        runs = [
            pool.submit(hash_run, tensor, start, *run)
            for tensor, start in zip(tensors, starts, strict=False)
            for run in tensor.own()
        ]
        for each in runs:
            each.result()


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.cpu().contiguous().reshape(-1).view(torch.uint8)


def _digest(content: torch.Tensor) -> torch.Tensor:
    digest = hashlib.sha256(content.reshape(-1).numpy().data).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
