"""Weights that every rank holds: used as they are, their gradients combined over ranks inside backward."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division


def with_combined_gradients(
    weights: Mapping[str, torch.Tensor], partial: Collection[str], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The same weights by the same names, whose gradients arrive on every rank as those of the mean of the losses.

    A weight that is applied after an exchange has on each rank the gradient of the rank's own loss: they are averaged,
    as by DDP. DDP itself serves only models whose ``forward`` returns tensors, and TorchRec's collections return a
    LazyAwaitable. All gradients go in one all-reduce; every rank must run backward through it.

    Args:
        weights: W2 by table.
        partial: tables whose weight is applied before an exchange. There a rank sees the bags' gradients from all
            ranks, but only of its own rows: they are summed.
        process_group: the ranks.
    """
    if not weights or not torch.is_grad_enabled() or dist.get_world_size(process_group) == 1:
        return dict(weights)
    mean, of_partial = 1 / dist.get_world_size(process_group), _partial_factor(process_group)
    factors = [of_partial if name in partial else mean for name in weights]
    return dict(zip(weights, _CombinedGradients.apply(process_group, factors, *weights.values()), strict=True))


def _partial_factor(process_group: dist.ProcessGroup | None) -> float:
    # TorchRec divides gradients by the world size on their way to the rows (comm_ops.GRADIENT_DIVISION).
    return 1.0 if get_gradient_division() else 1 / dist.get_world_size(process_group)


class _CombinedGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, process_group: dist.ProcessGroup | None, factors: list[float], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.process_group, ctx.factors = process_group, factors
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [gradient.reshape(-1) * factor for gradient, factor in zip(gradients, ctx.factors, strict=True)]
        flat = torch.cat(scaled)
        dist.all_reduce(flat, group=ctx.process_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
