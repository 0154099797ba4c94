"""Weights that every rank holds: used as they are, their gradients averaged over ranks inside backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def with_mean_gradients(
    weights: Mapping[str, torch.Tensor], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The same weights by the same names, whose gradients arrive as the mean over the ranks' own.

    One all-reduce a backward pass for all of them. DDP would do the same, but only for a model whose ``forward``
    returns tensors, and TorchRec's collections return a LazyAwaitable. Every rank must run backward through the
    result, as it must through TorchRec's own exchange.
    """
    if not weights or not torch.is_grad_enabled() or dist.get_world_size(process_group) == 1:
        return dict(weights)
    return dict(zip(weights, _MeanGradients.apply(process_group, *weights.values()), strict=True))


class _MeanGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, process_group: dist.ProcessGroup | None, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.process_group = process_group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=ctx.process_group)
        flat /= dist.get_world_size(ctx.process_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
