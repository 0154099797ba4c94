"""TorchRec's DLRM whose vectors are regularised, for the arms of a study (``model.builder``).

    mlet train config.yaml model.builder=benchmarks.regularised_dlrm:build model.arguments.decay=0.01

`model.arguments.decay` is the factor of an L2 penalty: decay/2 · ‖v‖² is added to the loss of each row, summed over its
pooled vectors v, before the mean over the batch. It acts on the product W = W1·W2, so that it means the same for MLET
and for single layers. An adaptive optimizer scales its gradients like all others: it is no decoupled weight decay.
`model.arguments.max_norm` scales longer vectors down to this length, also when the network is evaluated and served.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.models.dlrm import DLRM, SparseArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.models.builder import ModelInputs


class Decay(torch.autograd.Function):
    """Returns vectors ``(B, F, d)`` as they are, and adds decay/B times them to their gradients in backward.

    B counts the rows that the loss depends on: padding of a short batch gets no gradient, and none of the penalty.
    """

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, decay: float) -> torch.Tensor:
        ctx.save_for_backward(vectors)
        ctx.decay = decay
        return vectors.view_as(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (vectors,) = ctx.saved_tensors
        in_loss = (gradient != 0).any(dim=2, keepdim=True).any(dim=1, keepdim=True)
        return gradient + ctx.decay / in_loss.sum().clamp(min=1) * in_loss * vectors, None


class RegularisedSparseArch(SparseArch):
    """TorchRec's SparseArch, with an L2 penalty and a limit on the norm of its vectors.

    Args:
        embedding_bag_collection: the tables.
        decay: the factor of the penalty; 0: none.
        max_norm: the largest norm of a vector; None: any.

    Raises:
        ValueError: ``decay`` is below 0, or ``max_norm`` is not above 0.
    """

    def __init__(self, embedding_bag_collection: Any, decay: float, max_norm: float | None) -> None:
        if decay < 0:
            raise ValueError(f"model.arguments.decay: expected at least 0, found {decay}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"model.arguments.max_norm: expected a number above 0 or null, found {max_norm}")
        super().__init__(embedding_bag_collection)
        self.decay, self.max_norm = decay, max_norm

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Return vectors ``(B, F, d)``."""
        vectors: torch.Tensor = super().forward(features)
        if self.max_norm is not None:
            norms = vectors.square().sum(dim=2, keepdim=True).clamp(min=1e-12).sqrt()
            vectors = vectors * (self.max_norm / norms).clamp(max=1)
        return Decay.apply(vectors, self.decay) if self.decay else vectors


def build(inputs: ModelInputs) -> nn.Module:
    """Return the network around the tables of ``inputs``.

    Raises:
        ValueError: an argument is neither ``decay`` nor ``max_norm``, or out of range.
    """
    if unknown := set(inputs.arguments) - {"decay", "max_norm"}:
        raise ValueError(f"model.arguments: {', '.join(sorted(unknown))}: expected decay or max_norm")
    tables = inputs.embedding_bag_collection
    model = DLRM(
        embedding_bag_collection=tables,
        dense_in_features=len(inputs.dense_features),
        dense_arch_layer_sizes=[*inputs.settings.bottom_mlp, inputs.embedding_dim],
        over_arch_layer_sizes=[*inputs.settings.top_mlp, len(inputs.labels)],
    )
    model.sparse_arch = RegularisedSparseArch(
        tables, float(inputs.arguments.get("decay", 0)), inputs.arguments.get("max_norm")
    )
    return model
