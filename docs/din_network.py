"""A network for ``model.builder`` that attends over a history: the Deep Interest Network (arXiv:1706.06978).

    mlet train config.yaml model.builder=din_network:build 'model.sequences=[seen]' \\
        model.arguments.history=seen model.arguments.candidate=item

It needs PyTorch and TorchRec alone, so that a server can import it.
"""

import torch
from torch import nn


def mlp(columns: int, hidden: int) -> nn.Module:
    """Return two layers with one output."""
    return nn.Sequential(nn.Linear(columns, hidden), nn.PReLU(), nn.Linear(hidden, 1))


class Attention(nn.Module):
    """Sums the rows of a history, each multiplied by how much it has to do with the candidate."""

    def __init__(self, embedding_dim: int, hidden: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.score = mlp(4 * embedding_dim, hidden)

    def forward(self, candidate, history):
        """Map JaggedTensors of a candidate and of a history to their vectors ``(B, d)`` and ``(B, d)``."""
        item = candidate.to_padded_dense(1)  # (B, 1, d)
        rows = history.to_padded_dense(self.max_length)  # (B, L, d); longer histories lose their end
        items = item.expand_as(rows)
        scores = self.score(torch.cat([rows, items, rows - items, rows * items], dim=2))
        exists = torch.arange(self.max_length, device=rows.device) < history.lengths().unsqueeze(1)
        return item.squeeze(1), (scores * rows * exists.unsqueeze(2)).sum(dim=1)


class DeepInterestNetwork(nn.Module):
    """Returns logits ``(B,)``."""

    def __init__(self, inputs, candidate: str, history: str, hidden: int, max_length: int) -> None:
        super().__init__()
        self.sequences = inputs.embedding_collection
        self.bags = inputs.embedding_bag_collection  # None if all features are sequences
        self.candidate, self.history = candidate, history
        self.pooled = [name for name in inputs.sparse_features if name not in inputs.sequences]
        dims = inputs.embedding_dims
        self.attention = Attention(dims[history], hidden, max_length)
        columns = len(inputs.dense_features) + sum(dims[name] for name in (candidate, history, *self.pooled))
        self.top = mlp(columns, hidden)

    def forward(self, dense, features):
        sequences = self.sequences(features)  # a JaggedTensor for each feature: a row (d,) for each id
        parts = [dense, *self.attention(sequences[self.candidate], sequences[self.history])]
        if self.bags is not None:
            vectors = self.bags(features)
            parts += [vectors[name] for name in self.pooled]
        return self.top(torch.cat(parts, dim=1)).squeeze(1)


def build(inputs):
    """Return the network around the collections of ``inputs``."""
    settings = {"hidden": 32, "max_length": 50} | dict(inputs.arguments)
    if not inputs.sequences:
        raise ValueError("it needs a history; name its column in model.sequences")
    return DeepInterestNetwork(inputs, **settings)
