"""Batches of a prepared data set, each rank's share of them.

Global batch g is rows [g·B, (g+1)·B) of the split in file order, whatever the world size; rank r of R takes rows
[r·b, (r+1)·b) of it, b = B/R. So a run may go on with another world size and see the same global batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread

import numpy as np
import torch
from torch.fx._symbolic_trace import PHWithMeta
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mlet_dist.data.row_groups import RowReader, SplitRows
from mlet_dist.data.schema import SPLITS, DatasetSchema
from mlet_dist.errors import UserError

BATCHES_AHEAD = 4


@dataclass
class Batch(Pipelineable):
    """One rank's rows of a global batch; TorchRec's pipelines take it.

    Attributes:
        dense: (b, num_dense) float32.
        sparse: one id a bag, int64 values, stride b; a padding row's bags are empty.
        labels: (b,) float32.
        num_rows: rows ``[num_rows:]`` are padding, which only the last batch of an evaluation pass has.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor
    num_rows: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``."""
        return Batch(
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            num_rows=self.num_rows,
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return Batch(self.dense.pin_memory(), self.sparse.pin_memory(), self.labels.pin_memory(), self.num_rows)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses this batch."""
        self.dense.record_stream(stream)
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)

    def to_proxy_tuple(self, model: torch.nn.Module) -> tuple[PHWithMeta, PHWithMeta]:
        """Which attributes are ``dense_features`` and ``sparse_features`` of TorchRec's models, for its pipelines."""
        return PHWithMeta("dense"), PHWithMeta("sparse")


class DataLoader:
    """Iterates over one rank's batches of a split; a background thread reads ahead.

    Args:
        path: the data set's directory.
        split: ``train``, ``valid`` or ``test``.
        batch_size: rows of a global batch; a multiple of ``world_size``.
        rank, world_size: whose share to read.
        dense_features, sparse_features: which columns and in which order; all of the schema where None.
        drop_last: True drops an incomplete last global batch (training); False pads it, so that every row comes
            exactly once and all ranks make the same number of batches of the same shape (evaluation).
        start_batch: global batches to pass over without decoding them (resume).

    Raises:
        UserError: the data set, the split, a feature or the batch size does not fit; or, while iterating, a part is
            unreadable or holds a label other than 0 and 1, a dense value that is not finite or an id outside its table.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        dense_features: Sequence[str] | None,
        sparse_features: Sequence[str] | None,
        drop_last: bool,
        start_batch: int = 0,
    ) -> None:
        schema = DatasetSchema.load(path)
        if split not in SPLITS:
            raise UserError(f"{path}: split {split!r} does not exist; the splits are {', '.join(SPLITS)}")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} is not a positive multiple of the world size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        dense = _choose(path, "dense", dense_features, schema.dense)
        sparse = _choose(path, "sparse", sparse_features, tuple(schema.num_embeddings))
        self._rows = schema.rows[split]
        self._parts = SplitRows(path, schema, schema.parts[split], dense, sparse)
        self._batch_size, self._local_batch_size, self._rank = batch_size, batch_size // world_size, rank
        self._sparse = list(sparse)
        self._num_dense = len(dense)
        self._end_batch = self._rows // batch_size if drop_last else -(-self._rows // batch_size)
        if not self._end_batch:
            raise UserError(f"{path}: {split} has {self._rows} rows, fewer than one global batch of {batch_size}")
        if not 0 <= start_batch <= self._end_batch:
            raise UserError(f"{path}: cannot start {split} at batch {start_batch}; it has {self._end_batch} batches")
        self._start_batch = start_batch

    def __len__(self) -> int:
        """Number of batches that an iteration yields, the same on every rank; ``start_batch`` are not among them."""
        return self._end_batch - self._start_batch

    def __iter__(self) -> Iterator[Batch]:
        queue: Queue[Batch | BaseException | None] = Queue(maxsize=BATCHES_AHEAD)
        abandoned = Event()
        thread = Thread(target=self._produce, args=(queue, abandoned), name="mlet-loader", daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            abandoned.set()
            try:  # A full queue blocks the thread: make room for what it is about to put.
                while True:
                    queue.get_nowait()
            except Empty:
                thread.join()

    def _produce(self, queue: "Queue[Batch | BaseException | None]", abandoned: Event) -> None:
        try:
            reader = RowReader(self._parts)
            for index in range(self._start_batch, self._end_batch):
                if abandoned.is_set():
                    return
                queue.put(self._batch(reader, index))
            queue.put(None)
        except BaseException as error:  # the consumer raises it
            queue.put(error)

    def _batch(self, reader: RowReader, index: int) -> Batch:
        size = self._local_batch_size
        start = min(index * self._batch_size + self._rank * size, self._rows)
        num_rows = min(size, self._rows - start)
        dense = np.zeros((size, self._num_dense), dtype=np.float32)
        ids = np.empty((len(self._sparse), num_rows), dtype=np.int64)
        labels = np.zeros(size, dtype=np.float32)
        reader.read(start, dense[:num_rows], ids, labels[:num_rows])
        lengths = torch.zeros(len(self._sparse), size, dtype=torch.int64)
        lengths[:, :num_rows] = 1
        sparse = KeyedJaggedTensor(
            keys=self._sparse,
            values=torch.from_numpy(ids).flatten(),
            lengths=lengths.flatten(),
            stride=size,
            # Known here; otherwise TorchRec has to copy the lengths back from the device to learn them.
            length_per_key=[num_rows] * len(self._sparse),
            offset_per_key=[num_rows * i for i in range(len(self._sparse) + 1)],
        )
        return Batch(torch.from_numpy(dense), sparse, torch.from_numpy(labels), num_rows)


def _choose(path: Path, kind: str, wanted: Sequence[str] | None, offered: Sequence[str]) -> tuple[str, ...]:
    for name in wanted or ():
        if name not in offered:
            raise UserError(f"{path}: no {kind} feature {name!r}; it has {', '.join(offered)}")
    return tuple(offered if wanted is None else wanted)
