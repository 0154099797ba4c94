"""Requests to a serving package, as tensors and as JSON."""

from dataclasses import dataclass
from typing import Any

import torch

from mlet_dist.models.spec import ModelSpec

_EXAMPLE_ROWS = 4


@dataclass(frozen=True)
class Request:
    """What a package's model is called with; ``Predictor`` says the shapes."""

    dense: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The model's arguments."""
        plain = (self.dense, self.ids, self.lengths)
        return plain if self.weights is None else (*plain, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("dense", "ids", "lengths", "weights")
        return {name: tensor.tolist() for name, tensor in zip(names, self.tensors(), strict=False)}


def example_request(spec: ModelSpec) -> Request:
    """A few rows of made-up values, with lists of several lengths where a feature has lists."""
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
