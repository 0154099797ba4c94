"""Distinct keys and where they occur, and rows that are copied to all places where their keys occur, or pooled there.

Nothing here waits for a device.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchrec.distributed.utils import none_throws

_INT32_END = 1 << 31


@dataclass(frozen=True)
class Occurrences:
    """Where U distinct keys occur among n keys.

    Attributes:
        position: the position of each key among the distinct ones, ``(n,)`` int64.
        order: the positions of the n keys, those of equal keys side by side, ``(n,)`` int64. None on CUDA.
        starts: where in ``order`` the keys that are equal to each distinct one begin; n from U on, ``(n + 2,)`` int64.
            None on CUDA.
    """

    position: torch.Tensor
    order: torch.Tensor | None
    starts: torch.Tensor | None

    def transposed(self, size: int) -> "Occurrences":
        """Return the occurrences among the transpose of the n keys, if they are a matrix ``(size, n / size)``."""
        number, order = self.position.numel(), self.order
        position = self.position.view(size, number // size).t().reshape(-1)
        if order is not None:
            moved_to = torch.arange(number, device=order.device).view(number // size, size)
            order = moved_to.t().reshape(-1)[order]
        return replace(self, position=position, order=order)

    def rows(self, distinct: torch.Tensor) -> torch.Tensor:
        """Return the row of each key, ``(n, width)``.

        Args:
            distinct: the rows of the U distinct keys, and of at most one that does not occur, ``(U, width)``.
        """
        if self.order is None:
            return distinct.index_select(0, self.position)
        return _RowsOfKeys.apply(distinct, self.position, self.order, self.starts)

    def pooled(
        self, distinct: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None, num_features: int
    ) -> torch.Tensor:
        """Return the sums of the rows of bags of consecutive keys; arguments and result are those of ``pool``."""
        if self.order is None or (weights is not None and weights.requires_grad):
            return pool(distinct, self.position, lengths, weights, num_features)
        return _PooledRows.apply(distinct, self, lengths, weights, num_features)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors."""
        return [each for each in vars(self).values() if each is not None]


class _RowsOfKeys(torch.autograd.Function):
    """``index_select`` whose backward adds up the gradients of equal keys in the order in which they are given.

    On a CPU this takes a fifth of the time of the backward of ``index_select``. On CUDA a key that occurs thousands of
    times would be added up by a single block.
    """

    @staticmethod
    def forward(
        ctx: Any, distinct: torch.Tensor, position: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, starts[: distinct.shape[0] + 1])
        return distinct.index_select(0, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, starts = ctx.saved_tensors
        gradient = gradient.contiguous()  # embedding_bag is slow otherwise
        of_distinct = functional.embedding_bag(order, gradient, starts, mode="sum", include_last_offset=True)
        return of_distinct, None, None, None


class _PooledRows(torch.autograd.Function):
    """``pool`` whose backward adds up the gradients of equal keys in the order in which they are given.

    That of torch's ``embedding_bag`` sorts the keys again, and adds them one by one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        distinct: torch.Tensor,
        occurrences: Occurrences,
        lengths: torch.Tensor,
        weights: torch.Tensor | None,
        num_features: int,
    ) -> torch.Tensor:
        order, starts = none_throws(occurrences.order), none_throws(occurrences.starts)
        ctx.save_for_backward(order, starts[: distinct.shape[0] + 1], lengths, weights)
        ctx.num_features = num_features
        return pool(distinct, occurrences.position, lengths, weights, num_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, starts, lengths, weights = ctx.saved_tensors
        batch_size, number = gradient.shape[0], ctx.num_features
        # Bag i of feature f is at position f·b + i of the lengths, and at i·F + f of the gradient.
        bags = torch.arange(lengths.numel(), device=lengths.device).view(batch_size, number).t().reshape(-1)
        bag_of_key = torch.repeat_interleave(bags, lengths, output_size=order.numel())
        of_distinct = functional.embedding_bag(
            bag_of_key[order],
            gradient.contiguous().view(batch_size * number, gradient.shape[1] // number),
            starts,
            mode="sum",
            per_sample_weights=None if weights is None else weights.to(gradient.dtype)[order],
            include_last_offset=True,
        )
        return of_distinct, None, None, None, None


def pool(
    rows: torch.Tensor,
    position: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor | None,
    num_features: int,
) -> torch.Tensor:
    """Return the sums of the rows of bags, ``(b, F·width)``.

    Args:
        rows: ``(n, width)``; n is at least 1.
        position: the row of each id of the bags.
        lengths: the ids of each bag, feature by feature, ``(F·b,)``.
        weights: of the ids, if any.
        num_features: F.
    """
    batch_size, width = lengths.numel() // num_features, rows.shape[1]
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(lengths, dim=0, out=offsets[1:])
    pooled = functional.embedding_bag(
        position,
        rows,
        offsets,
        mode="sum",
        per_sample_weights=None if weights is None else weights.to(rows.dtype),
        include_last_offset=True,
    )
    return pooled.view(num_features, batch_size, width).transpose(0, 1).reshape(batch_size, num_features * width)


def sorted_distinct(keys: torch.Tensor, limit: int) -> tuple[torch.Tensor, Occurrences]:
    """Return the distinct keys in order, and where they occur.

    ``torch.unique`` does the same, but its result has a size that the host must know.

    Args:
        keys: ``(n,)`` int64, at least 0 and at most ``limit``.
        limit: what fills the first result up to n.

    Returns:
        The distinct keys, ``(n,)`` int64, and their occurrences.
    """
    number = keys.numel()
    # int32 is sorted in half the time.
    ordered, order = (keys.int() if limit < _INT32_END else keys).sort(stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    group = is_new.cumsum(0) - 1
    distinct = torch.full_like(keys, limit).scatter_(0, group, ordered.to(keys.dtype))
    position = torch.empty_like(order).scatter_(0, order, group)
    if keys.is_cuda:
        return distinct, Occurrences(position, None, None)
    # Each key but the first of its group is written into a last place that is cut off.
    place = torch.where(is_new, group, number + 2)
    starts = keys.new_full((number + 3,), number).scatter_(0, place, torch.arange(number, device=keys.device))[:-1]
    return distinct, Occurrences(position, order, starts)
