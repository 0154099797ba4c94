"""Weights that every rank holds: used as they are, their gradients combined over ranks inside backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division


def with_mean_gradients(
    weights: Mapping[str, torch.Tensor], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The same weights by the same names, whose gradients arrive as the mean over the ranks' own.

    For weights that are applied after an exchange: a rank's gradient is that of its own loss, as with DDP. DDP itself
    serves only models whose ``forward`` returns tensors, and TorchRec's collections return a LazyAwaitable.
    """
    return _combined(weights, process_group, 1 / dist.get_world_size(process_group))


def with_summed_gradients(
    weights: Mapping[str, torch.Tensor], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The same weights by the same names, whose gradients arrive as the sum over the ranks' parts.

    For weights that are applied before an exchange: a rank sees the bags' gradients from all ranks, divided by the
    world size where TorchRec does so (``comm_ops.GRADIENT_DIVISION``), but only of its own rows.
    """
    divided = get_gradient_division()
    return _combined(weights, process_group, 1.0 if divided else 1 / dist.get_world_size(process_group))


def _combined(
    weights: Mapping[str, torch.Tensor], process_group: dist.ProcessGroup | None, factor: float
) -> dict[str, torch.Tensor]:
    # One all-reduce a backward pass. Every rank must run backward through it, as through TorchRec's own exchange.
    if not weights or not torch.is_grad_enabled() or dist.get_world_size(process_group) == 1:
        return dict(weights)
    return dict(zip(weights, _CombinedGradients.apply(process_group, factor, *weights.values()), strict=True))


class _CombinedGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, process_group: dist.ProcessGroup | None, factor: float, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.process_group, ctx.factor = process_group, factor
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=ctx.process_group)
        flat *= ctx.factor
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
