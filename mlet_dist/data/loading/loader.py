"""The data loader: each rank's share of the batches of a prepared data set; ``order`` decides which rows those are."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx._symbolic_trace import PHWithMeta
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mlet_dist.data.loading.jagged_tensors import JaggedBuilder
from mlet_dist.data.loading.order import Order, Shuffle
from mlet_dist.data.loading.prefetch import iterate_ahead
from mlet_dist.data.loading.row_groups import SplitRows, read_windows
from mlet_dist.data.loading.rows import Rows
from mlet_dist.data.location import DataPath
from mlet_dist.data.schema import SPLITS, DatasetSchema
from mlet_dist.errors import UserError

BATCHES_AHEAD = 4

_logger = logging.getLogger(__name__)


@dataclass
class Batch(Pipelineable):
    """One rank's rows of a global batch, as TorchRec's train pipelines expect them.

    Attributes:
        dense: (b, num_dense) float32.
        sparse: int64 values, stride b; float32 weights if a feature is weighted; the bags of padding rows are empty.
        labels: (b,) float32; with several labels (b, L), NaN where a row lacks one.
        num_rows: rows ``[num_rows:]`` are padding, which only the last batch of an epoch has.
        global_rows: rows of the global batch, over all ranks and without padding.
        weights: (b,) float32, the weights of the rows, 0 for padding; None if all rows have the same.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor
    num_rows: int
    global_rows: int
    weights: torch.Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch on ``device``."""
        return replace(
            self,
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=non_blocking),
        )

    def predicted(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the logits that a model predicted, the labels, and the weights if any, without padding.

        Args:
            logits: ``(b,)``; with several labels ``(b, L)``.
        """
        rows = self.num_rows
        return logits[:rows], self.labels[:rows], None if self.weights is None else self.weights[:rows]

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory."""
        return replace(
            self,
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=None if self.weights is None else self.weights.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Record with the CUDA allocator that ``stream`` uses this batch."""
        self.dense.record_stream(stream)
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)
        if self.weights is not None:
            self.weights.record_stream(stream)

    def to_proxy_tuple(self, model: torch.nn.Module) -> tuple[PHWithMeta, PHWithMeta]:
        """Name the attributes that TorchRec's pipelines pass to a model as dense_features and sparse_features."""
        return PHWithMeta("dense"), PHWithMeta("sparse")


class DataLoader:
    """Iterates over one rank's batches of a split; background threads read, decode and check rows ahead.

    Each iterator covers one epoch, every row exactly once, and the next iterator covers the next epoch. An incomplete
    last batch is padded, so that all ranks have the same number of batches of the same shape. The threads of an
    iterator end when it is exhausted, closed or garbage-collected.

    Args:
        path: directory or URL of the data set (see ``data_set_path``).
        split: ``train``, ``valid`` or ``test``.
        batch_size: rows of a global batch; a multiple of ``world_size``.
        rank, world_size: the rank whose share to read, and the number of ranks.
        dense_features, sparse_features: the columns to read, in order; None reads all of the schema's.
        known_ids: of some sparse features, the number of ids that the model knows; the others become id 0, out of
            vocabulary.
        shuffle: shuffling of rows, different in each epoch (training); None keeps the order of the files.
        threads: number of decoding threads; one more thread assembles batches.
        pin_memory: put batches into pinned memory, for asynchronous copies to CUDA devices.
        first_rows: read only so many rows from the beginning of the split, as if it had no others; None reads all.

    Attributes:
        labels: the names of the labels, in the order of the columns of ``Batch.labels``.

    Raises:
        UserError: the data set does not exist, a part of this rank's share is damaged, the data set lacks the split or
            a feature, or the batch size does not fit; or, while iterating, a part is unreadable or holds a label other
            than 0 and 1, a dense value or weight that is not finite, an id outside its table, or a missing value.
    """

    def __init__(
        self,
        path: DataPath,
        split: str,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        dense_features: Sequence[str] | None,
        sparse_features: Sequence[str] | None,
        known_ids: Mapping[str, int] | None = None,
        shuffle: Shuffle | None = None,
        threads: int = 2,
        pin_memory: bool = False,
        first_rows: int | None = None,
    ) -> None:
        schema = DatasetSchema.load(path)
        if split not in SPLITS:
            raise UserError(f"{path}: split {split!r} does not exist; the splits are {', '.join(SPLITS)}")
        schema.check_split(path, split)
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} is not a positive multiple of the world size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        dense = _choose(path, "dense", dense_features, schema.dense)
        sparse = _choose(path, "sparse", sparse_features, tuple(schema.num_embeddings))
        by_row = shuffle is not None
        parts = schema.parts[split]
        # Each rank looks for damage to its share of the files at once: together they open every file once.
        checked = range(rank, len(parts), world_size)
        self._parts = SplitRows(path, schema, parts, dense, sparse, by_row=by_row, checked=checked, known_ids=known_ids)
        group_rows = self._parts.group_rows
        if first_rows is not None:
            group_rows = np.diff(np.minimum(np.cumsum(group_rows), first_rows), prepend=0)
        self._order = Order(
            group_rows,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        if not self._order.batches:
            raise UserError(f"{path}: {split} has no rows")
        if shuffle is not None and not self._order.mixes and not rank:
            _logger.warning(
                "%s: %s: its %d rows are one row group and make one batch, the same in each epoch; shuffle has no "
                "effect",
                *(path, split, self._order.rows),
            )
        self._name, self._batch_size, self._shuffle = f"{path}: {split}", batch_size, shuffle
        self._vocabulary_id, self._weighted, self.labels = schema.vocabulary_id, schema.sample_weight, schema.labels
        self._local_size = batch_size // world_size
        self._jagged = JaggedBuilder(sparse, self._local_size, weighted=self._parts.weighted)
        self._threads, self._pin_memory = threads, pin_memory
        self._position = 0  # number of batches, over all epochs, before the next iterator's first

    def __len__(self) -> int:
        """Return the number of batches per epoch, the same on every rank."""
        return self._order.batches

    @property
    def local_batch_size(self) -> int:
        """The rows of a batch on one rank, with padding."""
        return self._local_size

    @property
    def rows(self) -> int:
        """The number of rows per epoch, over all ranks."""
        return self._order.rows

    @property
    def weighted(self) -> bool:
        """Whether rows have weights."""
        return self._weighted

    def __iter__(self) -> Iterator[Batch]:
        epoch, first_batch = divmod(self._position, len(self))
        yield from iterate_ahead(self._batches(epoch, first_batch), BATCHES_AHEAD)
        self._position = (epoch + 1) * len(self)

    def state_dict(self, consumed: int) -> dict[str, int | str | None]:
        """Return the position of training after ``consumed`` batches of all epochs together, for any number of ranks.

        ``consumed`` is the caller's count, since a pipeline takes batches from the loader ahead of training.
        """
        epoch, batch = divmod(consumed, len(self))
        return {"epoch": epoch, "row": batch * self._batch_size, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Let the next iterator start at the position that ``state_dict`` returned, on any number of ranks.

        Returns:
            The number of batches that training had consumed.

        Raises:
            UserError: the state was saved with another seed, shuffle buffer, batch size, number of rows or batches, or
                vocabulary, or its row is not the first row of a batch.
        """
        saved = dict(state)
        if "batches" not in saved and type(saved.get("rows")) is int:
            saved["batches"] = saved["rows"] // self._batch_size  # versions that left an incomplete last batch out
        for key, expected in self._identity().items():
            if saved.get(key) != expected:
                raise UserError(
                    f"{self._name}: cannot resume where the run stopped: {key} was {saved.get(key, 'not saved')} and "
                    f"is {expected}; with another {key} the next batch would hold other rows or ids"
                )
        last = (len(self) - 1) * self._batch_size
        epoch = self._integer(state, "epoch", None, 1, "0 or more")
        row = self._integer(state, "row", last, self._batch_size, f"a multiple of {self._batch_size} from 0 to {last}")
        self._position = epoch * len(self) + row // self._batch_size
        return self._position

    def _integer(self, state: Mapping[str, Any], key: str, most: int | None, step: int, expected: str) -> int:
        value = state.get(key)
        # `type`, since isinstance accepts a bool as an int.
        if type(value) is not int or value < 0 or (most is not None and value > most) or value % step:
            raise UserError(
                f"{self._name}: cannot resume where the run stopped: {key} is {value!r:.80}; it must be a whole "
                f"number, {expected}"
            )
        return value

    def _identity(self) -> dict[str, int | str | None]:
        """Return what the order of rows depends on besides the files, and the meaning of the ids."""
        seed, buffer = (None, None) if self._shuffle is None else (self._shuffle.seed, self._shuffle.buffer_rows)
        return {
            "seed": seed,
            "shuffle_buffer": buffer,
            "batch_size": self._batch_size,
            "rows": self._order.rows,
            "batches": len(self),
            "vocabulary_id": self._vocabulary_id,
        }

    def _batches(self, epoch: int, first_batch: int) -> Generator[Batch, None, None]:
        with closing(read_windows(self._parts, self._order, epoch, first_batch, self._threads)) as windows:
            number = first_batch
            for window, rows in windows:
                for pick in self._order.picks(epoch, window):
                    yield self._batch(rows if pick is None else rows.take(pick), self._order.batch_rows(number))
                    number += 1

    def _batch(self, rows: Rows, global_rows: int) -> Batch:
        sparse = self._jagged.build(rows)
        dense, labels = self._padded(rows.dense), self._padded(rows.labels)
        weights = None if rows.weights is None else self._padded(rows.weights)
        batch = Batch(dense, sparse, labels, len(rows), global_rows, weights)
        return batch.pin_memory() if self._pin_memory else batch

    def _padded(self, values: npt.NDArray[np.float32]) -> torch.Tensor:
        """Return a copy with rows of zeros up to the rows of a batch on a rank."""
        padded = np.zeros((self._local_size, *values.shape[1:]), dtype=np.float32)
        padded[: len(values)] = values
        return torch.from_numpy(padded)


def _choose(path: DataPath, kind: str, wanted: Sequence[str] | None, offered: Sequence[str]) -> tuple[str, ...]:
    for name in wanted or ():
        if name not in offered:
            raise UserError(f"{path}: no {kind} feature {name!r}; it has {', '.join(offered)}")
    return tuple(offered if wanted is None else wanted)
