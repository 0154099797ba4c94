"""Made vectors in the place of a model's tables, so that the network around them runs without any table."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mlet_dist.errors import UserError
from mlet_dist.models.tables import collections_of, holds_sequences


class StandInTables(nn.Module):
    """Returns made vectors for any batch, in the place of one collection.

    Args:
        configs: of its tables.
        lengths: the number of ids of each row, of every feature; None for tables whose vectors are pooled.
        rows: of a batch.
        device: of the vectors.
    """

    def __init__(
        self, configs: Sequence[BaseEmbeddingConfig], lengths: torch.Tensor | None, rows: int, device: torch.device
    ) -> None:
        super().__init__()
        dims = {name: table.embedding_dim for table in configs for name in table.feature_names}
        self.features, self.dims = list(dims), list(dims.values())
        number = rows if lengths is None else int(lengths.sum())
        self.vectors = [torch.randn(number, dim, device=device, requires_grad=True) for dim in self.dims]
        self.calls = 0
        self._lengths = None if lengths is None else lengths.to(device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | dict[str, JaggedTensor]:
        self.calls += 1
        if self._lengths is None:
            return KeyedTensor(self.features, self.dims, torch.cat(self.vectors, dim=1))
        named = zip(self.features, self.vectors, strict=True)
        return {name: JaggedTensor(each, lengths=self._lengths) for name, each in named}


@dataclass(frozen=True)
class StandIns:
    """The stand-in tables of a model, by the names that it gives to its collections."""

    tables: dict[str, StandInTables]
    rows: int
    device: torch.device

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """The vectors of each feature, row by row."""
        found = (zip(each.features, each.vectors, strict=True) for each in self.tables.values())
        return dict(chain.from_iterable(found))

    def batch(self) -> KeyedJaggedTensor:
        """Return a batch of one id for each feature and row."""
        features = list(self.vectors)
        ids = torch.zeros(self.rows * len(features), dtype=torch.int64, device=self.device)
        return KeyedJaggedTensor(features, ids, lengths=torch.ones_like(ids), stride=self.rows)


@contextmanager
def stand_in_tables(
    model: nn.Module, rows: int, device: torch.device, sequence_lengths: Sequence[int] = (1,)
) -> Iterator[StandIns]:
    """Put stand-in tables into a model within the block.

    Args:
        model: with its collections of tables.
        rows: of a batch.
        device: of the vectors.
        sequence_lengths: the lengths of sequences, which the rows have in turn; their number divides ``rows``.
    """
    own = collections_of(model)
    found = {}
    for path, collection in own.items():
        lengths = torch.tensor(sequence_lengths).repeat(rows // len(sequence_lengths))
        sequences = holds_sequences(collection)
        configs = collection.embedding_configs() if sequences else collection.embedding_bag_configs()  # type: ignore[operator]
        found[path] = StandInTables(configs, lengths if sequences else None, rows, device)
        model.set_submodule(path, found[path])
    try:
        yield StandIns(found, rows, device)
    finally:
        for path, collection in own.items():
            model.set_submodule(path, collection)


def check_logits(logits: object, rows: int, labels: int | None = 1) -> None:
    """Raise UserError unless a network returned a logit for each row and label; None is any number of labels."""
    shapes = [(rows,), (rows, 1)] if labels == 1 else [(rows, labels)]
    expected = f"logits {' or '.join(map(str, shapes))} of floating point numbers for {rows} rows"
    if labels is not None and labels > 1:
        expected += f" and {labels} labels"
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"model.builder: the module returned {type(logits).__name__}; it must return {expected}")
    fits = tuple(logits.shape) in shapes if labels is not None else logits.dim() in (1, 2) and len(logits) == rows
    if not fits or not logits.is_floating_point():
        raise UserError(
            f"model.builder: the module returned {tuple(logits.shape)} of {logits.dtype}; it must return {expected}"
        )
