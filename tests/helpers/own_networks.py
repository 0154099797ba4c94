"""Builders for ``model.builder``, as a user would write them, good and bad. None of them imports mlet_dist."""

import os
import sys
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
            self.deep[0] = nn.LazyLinear(8)
        if self.fault == "running statistics":
            self.norm = nn.BatchNorm1d(self.wide.in_features)
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
        x = torch.cat([dense, *(vectors[name] for name in names)], dim=1)
        if self.fault == "running statistics":
            x = self.norm(x)
        if self.fault == "mixes rows":
            x = x - x.mean(dim=0)
        if self.fault == "creates parameters":
            self.scale = nn.Parameter(torch.ones(x.shape[1]))
            x = x * self.scale
        total = x.sum(dim=1)
        if self.fault == "two logits":
            return torch.stack([total, total], dim=1)
        if self.fault == "no tensor":
            return {"logits": total}
        if self.fault == "wrong size":
            return total @ torch.ones(3)
        if self.fault == "depends on values" and float(total[0]) > 0:
            return total + 1
        return total


class Frozen(WideAndDeep):
    """Has a layer and buffers that are not trained, whose values differ between processes, and dropout."""

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs)
        drawn = torch.Generator().manual_seed(os.getpid())
        self.fixed = nn.Linear(self.wide.in_features, 1).requires_grad_(False)
        self.fixed.weight.copy_(torch.randn(self.fixed.weight.shape, generator=drawn))
        self.register_buffer("scale", torch.rand(1, generator=drawn))
        self.register_buffer("mask", torch.rand(1, 8, generator=drawn) > 0.5)
        self.register_buffer("not_saved", torch.rand(2, 8, generator=drawn).T, persistent=False)

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        vectors = self.ebc(features)
        x = nn.functional.dropout(
            torch.cat([dense] + [vectors[name] for name in self.names], dim=1), 0.2, self.training
        )
        return (self.deep(x) + self.wide(x) + self.fixed(x) * self.scale).squeeze(1)


def frozen(inputs: Any) -> nn.Module:
    return Frozen(inputs)


def wide_and_deep(inputs: Any) -> nn.Module:
    return WideAndDeep(inputs)


def choosy(inputs: Any) -> nn.Module:
    return Choosy(inputs)


def broken(inputs: Any) -> Any:
    fault = inputs.arguments["fault"]
    if fault == "raises":
        raise KeyError("hiden")
    if fault == "exits":
        sys.exit("two towers need a query feature")
    if fault == "no module":
        return "a model"
    if fault == "without tables":
        return nn.Linear(3, 1)
    if fault == "the tables":
        return inputs.embedding_bag_collection
    return Broken(inputs)


NOT_A_FUNCTION = 3


class CountsIds(WideAndDeep):
    """Adds the number of ids of each row, which it reads from the KeyedJaggedTensor."""

    def forward(self, dense, features):  # type: ignore[no-untyped-def]
        return super().forward(dense, features) + features.lengths().view(-1, features.stride()).sum(0)


def counts_ids(inputs: Any) -> nn.Module:
    return CountsIds(inputs)
