"""A network for ``model.builder``: a linear model beside an MLP, both of all vectors and dense columns.

    mlet train config.yaml model.builder=own_network:build model.arguments.hidden=64

It needs PyTorch alone. A server that imports it builds the same module around TorchRec's EmbeddingBagCollection.
"""

import torch
from torch import nn


class WideAndDeep(nn.Module):
    """Returns logits ``(B,)``."""

    def __init__(self, tables: nn.Module, features: list[str], columns: int, hidden: int) -> None:
        super().__init__()
        self.tables, self.features = tables, features
        self.deep = nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.wide = nn.Linear(columns, 1)

    def forward(self, dense, features):
        vectors = self.tables(features)  # TorchRec's KeyedTensor: (B, d) for each feature
        x = torch.cat([dense, *[vectors[name] for name in self.features]], dim=1)
        return (self.wide(x) + self.deep(x)).squeeze(1)


def build(inputs):
    """Return the network around the tables of ``inputs``."""
    columns = len(inputs.dense_features) + sum(inputs.embedding_dims.values())
    return WideAndDeep(
        inputs.embedding_bag_collection, list(inputs.sparse_features), columns, inputs.arguments["hidden"]
    )
