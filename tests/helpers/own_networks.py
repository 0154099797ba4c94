"""Builders for ``model.builder``, as a user would write them, good and bad. None of them imports mlet_dist."""

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig


class WideAndDeep(nn.Module):
    """A linear model beside an MLP, both of all vectors and dense columns; logits ``(B,)``."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.ebc = inputs.embedding_bag_collection
        self.names = list(inputs.sparse_features)
        width, hidden = (
            sum(inputs.embedding_dims.values()) + len(inputs.dense_features),
            inputs.arguments.get("hidden", 8),
        )
        self.deep = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.wide = nn.Linear(width, 1)

    def forward(self, dense, features):  # type: ignore[no-untyped-def]  # users need not write annotations
        vectors = self.ebc(features)
        x = torch.cat([dense] + [vectors[name] for name in self.names], dim=1)
        return (self.deep(x) + self.wide(x)).squeeze(1)


class Choosy(WideAndDeep):
    """Computes the same in a way that depends on values."""

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        logits = super().forward(dense, features)
        return logits if float(logits.detach().sum()) > 0 else logits + 0


class Broken(WideAndDeep):
    """Does with the sum of all vectors and columns what ``arguments.fault`` says."""

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs)
        self.fault = inputs.arguments["fault"]
        if self.fault == "held twice":
            self.again = self.ebc
        if self.fault == "lazy":
            self.out = nn.LazyLinear(1)
        if self.fault == "normalizes batches":
            self.norm = nn.BatchNorm1d(1)
        if self.fault == "other tables":
            del self.ebc
            config = EmbeddingBagConfig(name="C9", embedding_dim=4, num_embeddings=3, feature_names=["C9"])
            self.other = EmbeddingBagCollection([config])
            self.ebc = inputs.embedding_bag_collection

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        vectors = self.ebc(features)
        if self.fault == "called twice":
            vectors = self.ebc(features)
        names = self.names[:-1] if self.fault == "loses a feature" else self.names
        total = torch.cat([dense, *(vectors[name] for name in names)], dim=1).sum(dim=1)
        if self.fault == "normalizes batches":
            return self.norm(total.unsqueeze(1))
        if self.fault == "two logits":
            return torch.stack([total, total], dim=1)
        if self.fault == "no tensor":
            return {"logits": total}
        if self.fault == "wrong size":
            return total @ torch.ones(3)
        if self.fault == "depends on values" and float(total[0]) > 0:
            return total + 1
        return total


def wide_and_deep(inputs: Any) -> nn.Module:
    return WideAndDeep(inputs)


def choosy(inputs: Any) -> nn.Module:
    return Choosy(inputs)


def broken(inputs: Any) -> Any:
    fault = inputs.arguments["fault"]
    if fault == "raises":
        raise KeyError("hiden")
    if fault == "no module":
        return "a model"
    if fault == "without tables":
        return nn.Linear(3, 1)
    if fault == "the tables":
        return inputs.embedding_bag_collection
    return Broken(inputs)


NOT_A_FUNCTION = 3
