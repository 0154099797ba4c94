"""The networks that ``model.name`` offers, each built around the tables of a model.

All take dense columns ``(B, D)`` float32 and a KeyedJaggedTensor, and return logits ``(B, L)`` for L labels. They call
the tables ``sparse_arch.embedding_bag_collection``, as TorchRec's models do.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN, DenseArch, InteractionDCNArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.deepfm import DeepFM, FactorizationMachine
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.config.model_section import ModelName
from mlet_dist.errors import UserError
from mlet_dist.models.builder import ModelInputs


class PooledTables(nn.Module):
    """The tables, by the name that TorchRec's models give them; returns a KeyedTensor with a vector per feature."""

    def __init__(self, embedding_bag_collection: nn.Module) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection

    def forward(self, sparse_features: KeyedJaggedTensor) -> KeyedTensor:
        vectors: KeyedTensor = self.embedding_bag_collection(sparse_features)
        return vectors


class DeepFMModel(nn.Module):
    """DeepFM (arXiv:1703.04247): TorchRec's SimpleDeepFMNN with MLPs of any size and with logits for probabilities.

    The dense arch makes a vector of d columns of the dense columns. The vectors of all features and that one go into
    TorchRec's DeepFM and FactorizationMachine, and the over arch takes what these return.

    Args:
        inputs: what the model is built for; all vectors have d columns.
    """

    def __init__(self, inputs: ModelInputs) -> None:
        super().__init__()
        settings, d = inputs.settings, inputs.embedding_dim
        self.features = list(inputs.sparse_features)
        self.sparse_arch = PooledTables(inputs.embedding_bag_collection)
        self.dense_arch = DenseArch(len(inputs.dense_features), [*settings.bottom_mlp, d])
        self.deep_fm = DeepFM(MLP(d * (len(self.features) + 1), [settings.fm_dim]))
        self.fm = FactorizationMachine()
        self.over_arch = OverArch(d + settings.fm_dim + 1, [*settings.top_mlp, len(inputs.labels)])

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits ``(B, L)``."""
        dense, vectors = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        together = [dense, *(vectors[name] for name in self.features)]
        interaction = torch.cat([dense, self.deep_fm(together), self.fm(together)], dim=1)
        logits: torch.Tensor = self.over_arch(interaction)
        return logits


class TwoTower(nn.Module):
    """The dot product of a query tower and a candidate tower, as in TorchRec's retrieval example.

    The query tower takes the dense columns and the vectors of its features, the candidate tower those of all others.
    The dot product is the logit.

    Args:
        inputs: what the model is built for; vectors may have any numbers of columns.

    Raises:
        UserError: ``query_features`` names a feature that the model does not have, or leaves none for the candidates;
            or there are several labels.
    """

    def __init__(self, inputs: ModelInputs) -> None:
        super().__init__()
        if len(inputs.labels) > 1:
            raise UserError(
                f"model.name two_tower predicts one label, and the data set has {', '.join(inputs.labels)}; use dlrm, "
                "dlrm_dcn, deepfm or model.builder"
            )
        self.query, self.candidate = _features_of_towers(inputs)
        self.sparse_arch = PooledTables(inputs.embedding_bag_collection)
        sizes, dims = list(inputs.settings.top_mlp), inputs.embedding_dims
        self.query_tower = _tower(len(inputs.dense_features) + sum(dims[name] for name in self.query), sizes)
        self.candidate_tower = _tower(sum(dims[name] for name in self.candidate), sizes)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits ``(B, 1)``."""
        vectors = self.sparse_arch(sparse_features)
        query = self.query_tower(torch.cat([dense_features, *(vectors[name] for name in self.query)], dim=1))
        candidate = self.candidate_tower(torch.cat([vectors[name] for name in self.candidate], dim=1))
        return (query * candidate).sum(dim=1, keepdim=True)


class CrossNetworkOfAnyVectors(nn.Module):
    """TorchRec's DLRM_DCN for vectors of different numbers of columns, of which it concatenates one number alone.

    Its parts, and their names in the state dict, are those of DLRM_DCN.

    Args:
        inputs: what the model is built for; the dense arch makes a vector of ``model.embedding_dim`` columns.
    """

    def __init__(self, inputs: ModelInputs) -> None:
        super().__init__()
        settings = inputs.settings
        self.features = list(inputs.sparse_features)
        self.sparse_arch = PooledTables(inputs.embedding_bag_collection)
        self.dense_arch = DenseArch(len(inputs.dense_features), [*settings.bottom_mlp, settings.embedding_dim])
        width = settings.embedding_dim + sum(inputs.embedding_dims.values())
        cross_network = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        self.inter_arch = InteractionDCNArch(len(self.features), cross_network)
        self.over_arch = OverArch(width, [*settings.top_mlp, len(inputs.labels)])

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits ``(B, L)``."""
        dense, vectors = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        together = torch.cat([dense, *(vectors[name] for name in self.features)], dim=1)
        logits: torch.Tensor = self.over_arch(self.inter_arch.crossnet(together))
        return logits


def _dlrm(inputs: ModelInputs) -> nn.Module:
    return DLRM(
        embedding_bag_collection=inputs.embedding_bag_collection,
        dense_in_features=len(inputs.dense_features),
        dense_arch_layer_sizes=[*inputs.settings.bottom_mlp, inputs.embedding_dim],
        over_arch_layer_sizes=[*inputs.settings.top_mlp, len(inputs.labels)],
    )


def _dlrm_dcn(inputs: ModelInputs) -> nn.Module:
    if set(inputs.embedding_dims.values()) != {inputs.settings.embedding_dim}:
        return CrossNetworkOfAnyVectors(inputs)
    return DLRM_DCN(
        embedding_bag_collection=inputs.embedding_bag_collection,
        dense_in_features=len(inputs.dense_features),
        dense_arch_layer_sizes=[*inputs.settings.bottom_mlp, inputs.embedding_dim],
        over_arch_layer_sizes=[*inputs.settings.top_mlp, len(inputs.labels)],
        dcn_num_layers=inputs.settings.cross_layers,
        dcn_low_rank_dim=inputs.settings.cross_rank,
    )


ARCHITECTURES: dict[ModelName, Callable[[ModelInputs], nn.Module]] = {
    "dlrm": _dlrm,
    "dlrm_dcn": _dlrm_dcn,
    "deepfm": DeepFMModel,
    "two_tower": TwoTower,
}
"""The builder of each ``model.name``."""


def _tower(in_features: int, sizes: Sequence[int]) -> nn.Module:
    """Return an MLP whose last layer has no activation, so that towers can point away from each other."""
    hidden = [MLP(in_features, list(sizes[:-1]))] if len(sizes) > 1 else []
    return nn.Sequential(*hidden, nn.Linear(sizes[-2] if hidden else in_features, sizes[-1]))


def _features_of_towers(inputs: ModelInputs) -> tuple[list[str], list[str]]:
    wanted = inputs.settings.query_features or ()
    unknown = [name for name in wanted if name not in inputs.sparse_features]
    if unknown:
        raise UserError(
            f"model.query_features: the model has no feature {unknown[0]!r}; it has {', '.join(inputs.sparse_features)}"
        )
    candidate = [name for name in inputs.sparse_features if name not in wanted]
    if not candidate:
        raise UserError("model.query_features names all features; leave some for the candidate tower")
    return [name for name in inputs.sparse_features if name in wanted], candidate
