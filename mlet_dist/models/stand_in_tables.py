"""Made vectors in the place of a model's tables, so that the network around them runs without any table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.errors import UserError
from mlet_dist.models.tables import tables_of, tables_path


class StandInTables(nn.Module):
    """Returns made vectors for any batch."""

    def __init__(self, configs: list[EmbeddingBagConfig], rows: int, device: torch.device) -> None:
        super().__init__()
        dims = {name: table.embedding_dim for table in configs for name in table.feature_names}
        self.features, self.dims = list(dims), list(dims.values())
        self.vectors = [torch.randn(rows, dim, device=device, requires_grad=True) for dim in self.dims]
        self.calls, self._configs, self._rows, self._device = 0, configs, rows, device

    def batch(self) -> KeyedJaggedTensor:
        """Return a batch of one id for each feature and row."""
        ids = torch.zeros(self._rows * len(self.features), dtype=torch.int64, device=self._device)
        return KeyedJaggedTensor(self.features, ids, lengths=torch.ones_like(ids), stride=self._rows)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        self.calls += 1
        return KeyedTensor(self.features, self.dims, torch.cat(self.vectors, dim=1))


@contextmanager
def stand_in_tables(model: nn.Module, rows: int, device: torch.device) -> Iterator[StandInTables]:
    """Put stand-in tables into a model within the block."""
    own, path = tables_of(model), tables_path(model)
    parent = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    configs = cast(EmbeddingBagCollectionInterface, own).embedding_bag_configs()
    found = StandInTables(configs, rows, device)
    setattr(parent, name, found)
    try:
        yield found
    finally:
        setattr(parent, name, own)


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
