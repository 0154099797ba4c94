"""A network for ``model.builder`` that predicts several labels: MMoE (Ma et al., KDD 2018).

    mlet train config.yaml model.builder=multi_task_network:build model.arguments.experts=4 model.arguments.width=64

Experts see all vectors and dense columns. Each label has a gate that weighs the experts for a row, and a tower. It
needs PyTorch alone.
"""

import torch
from torch import nn


class MMoE(nn.Module):
    """Returns logits ``(B, L)``, in the order of the labels."""

    def __init__(self, tables, features: list[str], columns: int, labels: int, experts: int, width: int) -> None:
        super().__init__()
        self.tables, self.features = tables, features
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(columns, width), nn.ReLU()) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(columns, experts) for _ in range(labels))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(labels)
        )

    def forward(self, dense, features):
        vectors = self.tables(features)  # TorchRec's KeyedTensor: (B, d) for each feature
        x = torch.cat([dense, *[vectors[name] for name in self.features]], dim=1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # (B, experts, width)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            shares = torch.softmax(gate(x), dim=1).unsqueeze(2)
            logits.append(tower((shares * experts).sum(dim=1)))
        return torch.cat(logits, dim=1)


def build(inputs):
    """Return the network around the tables of ``inputs``."""
    columns = len(inputs.dense_features) + sum(inputs.embedding_dims.values())
    sizes = inputs.arguments["experts"], inputs.arguments["width"]
    return MMoE(inputs.embedding_bag_collection, list(inputs.sparse_features), columns, len(inputs.labels), *sizes)
