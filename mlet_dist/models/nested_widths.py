"""Widths of a model that is trained at several (Matryoshka representations, arXiv:2205.13147).

At width r the network sees the first r columns of every vector, and zeros for the others. In the networks of
``model.name`` the same columns of the dense arch's output are zero, so that such a network is the one with
``embedding_dim`` r: the weights that only meet zeros can be left out (``mlet_dist/models/column_slices.py``).

Vectors are multiplied by zeros and ones after they have been pooled and exchanged. So the gradients of the columns
beyond r are zero, whatever the exchange, the sharding and the optimizer are.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.models.dlrm import DenseArch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import collections_of


class NestedWidths:
    """Runs a model at several widths; hooks on its modules do so, and do nothing in any other call of the model.

    Args:
        collections: those of the model's tables, sharded or not, which return the vectors.
        dense_arch: the module whose output has the columns of the vectors, too; None if there is none.
        embedding_dim: d, of all tables.
        nested_dims: the widths below d.

    Attributes:
        widths: all widths, d first.
    """

    def __init__(
        self,
        collections: Iterable[nn.Module],
        dense_arch: nn.Module | None,
        embedding_dim: int,
        nested_dims: Iterable[int],
    ) -> None:
        self.widths = (embedding_dim, *sorted(nested_dims, reverse=True))
        self._embedding_dim = embedding_dim
        self._copies = 1
        self._seen: torch.Tensor | None = None
        for collection in collections:
            collection.register_forward_hook(self._mask_tables)
        if dense_arch is not None:
            dense_arch.register_forward_hook(self._mask_dense)

    @classmethod
    def of(cls, spec: ModelSpec, model: nn.Module) -> "NestedWidths | None":
        """Return the widths of a model that is trained at several; None for any other."""
        if spec.model.nested_dims is None:
            return None
        dense_arch = None
        if spec.model.builder is None:
            dense_arch = next((each for each in model.modules() if isinstance(each, DenseArch)), None)
        return cls(collections_of(model).values(), dense_arch, spec.model.embedding_dim, spec.model.nested_dims)

    def at_all(self, model: nn.Module, dense: torch.Tensor, sparse: KeyedJaggedTensor) -> list[torch.Tensor]:
        """Return the logits ``(b, …)`` at each of ``widths``, with one lookup.

        The network gets each row once for every width, since the logit of a row depends on that row alone.
        """
        rows, copies = len(dense), len(self.widths)
        seen = self._columns(torch.tensor(self.widths, device=dense.device)).repeat_interleave(rows, dim=0)
        with self._seeing(seen, copies):
            logits: torch.Tensor = model(dense.repeat(copies, 1), sparse)
        return list(logits.split(rows))

    def at_width(
        self, model: nn.Module, dense: torch.Tensor, sparse: KeyedJaggedTensor, widths: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits ``(b, …)`` of rows that each have a width of their own.

        Args:
            widths: ``(b,)`` integers, or ``(1,)`` for all rows.
        """
        with self._seeing(self._columns(widths).expand(len(dense), -1), 1):
            logits: torch.Tensor = model(dense, sparse)
        return logits

    def _columns(self, widths: torch.Tensor) -> torch.Tensor:
        """Return which columns are seen at each width, ``(len(widths), d)`` of ones and zeros."""
        return (torch.arange(self._embedding_dim, device=widths.device) < widths[:, None]).float()

    @contextmanager
    def _seeing(self, seen: torch.Tensor, copies: int) -> Iterator[None]:
        self._seen, self._copies = seen, copies
        try:
            yield
        finally:
            self._seen, self._copies = None, 1

    def _mask_dense(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self._seen is None else output * self._seen.to(output.dtype)

    def _mask_tables(self, _: nn.Module, __: Any, output: Any) -> Any:
        seen, copies = self._seen, self._copies
        if seen is None:
            return output
        if isinstance(output, LazyAwaitable):  # of a sharded collection, whose vectors have not arrived yet
            output.callbacks.append(lambda vectors: _masked(vectors, seen, copies))
            return output
        return _masked(output, seen, copies)


def _masked(vectors: Any, seen: torch.Tensor, copies: int) -> Any:
    """Return ``copies`` of the vectors of all rows, one after the other, with the columns of each row that are seen."""
    if isinstance(vectors, KeyedTensor):
        values = vectors.values().repeat(copies, 1)
        masked = values.view(len(values), -1, seen.shape[1]) * seen[:, None]
        return KeyedTensor(vectors.keys(), vectors.length_per_key(), masked.view(values.shape))
    found = {}
    for name, sequence in vectors.items():
        lengths, values = sequence.lengths().repeat(copies), sequence.values().repeat(copies, 1)
        of_ids = torch.repeat_interleave(seen, lengths.long(), dim=0, output_size=len(values))
        found[name] = JaggedTensor(values * of_ids, lengths=lengths)
    return found
