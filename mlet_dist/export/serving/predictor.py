"""A request to a serving package, and the module that validates and answers it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.models.spec import ModelSpec

_EXAMPLE_ROWS = 4


@dataclass(frozen=True)
class Request:
    """The inputs of a package's model; for shapes see ``Predictor``."""

    dense: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the model's arguments in order."""
        plain = (self.dense, self.ids, self.lengths)
        return plain if self.weights is None else (*plain, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        names = ("dense", "ids", "lengths", "weights")
        return {name: tensor.tolist() for name, tensor in zip(names, self.tensors(), strict=False)}


def example_request(spec: ModelSpec) -> Request:
    """Return a request of a few rows of synthetic values, with lists of different lengths for multi-valued features."""
    rows = _EXAMPLE_ROWS
    lengths = [[(row + 1) % rows if feature.multi_valued else 1 for row in range(rows)] for feature in spec.sparse]
    ids = [
        (7919 * number + 104729 * row) % feature.num_embeddings
        for number, (feature, counts) in enumerate(zip(spec.sparse, lengths, strict=True), start=1)
        for row in range(sum(counts))
    ]
    dense = torch.arange(rows * len(spec.dense), dtype=torch.float32).view(rows, len(spec.dense)) / 10
    weighted = [[feature.weighted] * sum(counts) for feature, counts in zip(spec.sparse, lengths, strict=True)]
    flat = torch.tensor([each for flags in weighted for each in flags])
    return Request(
        dense=dense,
        ids=torch.tensor(ids),
        lengths=torch.tensor(lengths),
        weights=torch.where(flat, 0.5, 1.0) if spec.is_weighted else None,
    )


class Predictor(nn.Module):
    """A model that validates its input and returns probabilities; compatible with TorchScript.

    ``forward(dense, ids, lengths, weights)`` for B rows, D dense columns and F features returns (B,) float32, or (B, L)
    for L labels:

    - ``dense`` (B, D) float32, transformed like the training data;
    - ``lengths`` (F, B) int64: the number of ids of each feature in each row;
    - ``ids`` (lengths.sum(),) int64: those of the first feature, row after row, then those of the second, and so on;
    - ``weights`` float32, one per id, if the model has a weighted feature (1 for the others); else None.

    Raises:
        ValueError: a shape or dtype is wrong; a value or weight is not finite; a length is negative or, for a feature
            with one id per row, not 1; an id is not in its table.

    Args:
        logits: the model or its trace, ``(dense, KeyedJaggedTensor) -> (B,)``, ``(B, 1)`` or ``(B, L)``.
        spec: names and sizes of its inputs.
    """

    rows: torch.Tensor
    one_id_a_row: torch.Tensor

    def __init__(self, logits: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.logits = logits
        self.features = [feature.name for feature in spec.sparse]
        self.dense_columns = len(spec.dense)
        self.weighted = spec.is_weighted
        self.shape = [-1] if len(spec.labels) == 1 else [-1, len(spec.labels)]
        self.register_buffer("rows", torch.tensor([feature.num_embeddings for feature in spec.sparse]))
        self.register_buffer("one_id_a_row", torch.tensor([[not feature.multi_valued] for feature in spec.sparse]))

    def forward(
        self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.check_shapes(dense, ids, lengths)
        self.check_weights(ids, weights)
        self.check_lengths(ids, lengths)
        self.check_ids(ids, lengths)
        bags = KeyedJaggedTensor(self.features, ids, weights, lengths.flatten())
        return torch.sigmoid(self.logits(dense, bags).reshape(self.shape))

    def check_shapes(self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """Raise ValueError unless shapes and dtypes are those of ``forward`` and ``dense`` is finite."""
        if dense.dtype != torch.float32 or ids.dtype != torch.int64 or lengths.dtype != torch.int64:
            raise ValueError("dense must be float32, ids and lengths int64")
        if dense.dim() != 2 or dense.size(1) != self.dense_columns:
            raise ValueError(f"dense is {list(dense.size())}; it must be [rows, {self.dense_columns}]")
        expected = [len(self.features), dense.size(0)]
        if list(lengths.size()) != expected:
            raise ValueError(f"lengths is {list(lengths.size())}; it must be [features, rows]: {expected}")
        if ids.dim() != 1:
            raise ValueError(f"ids is {list(ids.size())}; it must have one dimension")
        if not bool(torch.isfinite(dense).all()):
            raise ValueError("dense holds a value that is not finite")

    def check_weights(self, ids: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Raise ValueError unless weights are given exactly if required, one per id, and finite."""
        if weights is None:
            if self.weighted:
                raise ValueError("weights is missing: the model has a weighted feature")
        else:
            if not self.weighted:
                raise ValueError("weights is given, but the model has no weighted feature")
            if weights.dtype != torch.float32 or weights.size() != ids.size():
                raise ValueError(
                    f"weights is {list(weights.size())}; it must be {list(ids.size())} float32, one per id"
                )
            if not bool(torch.isfinite(weights).all()):
                raise ValueError("weights holds a value that is not finite")

    def check_lengths(self, ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """Raise ValueError unless lengths sum up to the number of ids and are 1 for features with one id per row."""
        if bool((lengths < 0).any()):
            raise ValueError("lengths holds a number below 0")
        if int(lengths.sum()) != ids.size(0):
            raise ValueError(f"lengths sums up to {int(lengths.sum())}, but there are {ids.size(0)} ids")
        wrong = torch.logical_and(self.one_id_a_row, lengths != 1).any(1)
        if bool(wrong.any()):
            name = self.features[int(wrong.nonzero()[0, 0])]
            raise ValueError(f"lengths of {name} must all be 1: it has one id per row")

    def check_ids(self, ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """Raise ValueError unless each id is in [0, num_embeddings) of its table."""
        counts = lengths.sum(1)
        wrong = torch.logical_or(ids < 0, ids >= torch.repeat_interleave(self.rows, counts))
        if bool(wrong.any()):
            position = int(wrong.nonzero()[0, 0])
            feature = int((counts.cumsum(0) <= position).sum())
            name, rows = self.features[feature], int(self.rows[feature])
            raise ValueError(f"id {int(ids[position])} of {name} is not in [0, {rows})")


class ExportedPredictor(Predictor):
    """A ``Predictor`` for torch.export, whose graphs have no branches: it validates by assertions and shape guards."""

    def forward(
        self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        torch._assert_async(torch.isfinite(dense).all(), "dense holds a value that is not finite")
        if weights is not None:
            torch._assert_async(torch.isfinite(weights).all(), "weights holds a value that is not finite")
        torch._assert_async((lengths >= 0).all(), "lengths holds a number below 0")
        torch._assert_async(lengths.sum() == ids.size(0), "lengths does not sum up to the number of ids")
        wrong = torch.logical_and(self.one_id_a_row, lengths != 1)
        torch._assert_async(torch.logical_not(wrong.any()), "a feature with one id per row has another length")
        limits = torch.repeat_interleave(self.rows, lengths.sum(1), output_size=ids.size(0))
        torch._assert_async(torch.logical_and(ids >= 0, ids < limits).all(), "an id is not in its table")
        bags = KeyedJaggedTensor(self.features, ids, weights, lengths.flatten())
        return torch.sigmoid(self.logits(dense, bags).reshape(self.shape))
