"""Choosing the width of each row from its utility, and moving rows between widths without changing their vectors.

A row of width w with W2 ``(w, d)`` has the vector x·W2. When it moves to another width, its new values are the
least-squares solution of x'·W2' = x·W2 with the smallest norm. The vector stays what it was if the new width is d or
more, and is the closest possible one otherwise. (FIITED, arXiv:2401.04408, drops columns instead.)

The gradient of the row is g·W2ᵀ, where g is the gradient of its vector. So a mean of its gradients moves the other way:
g is the least-squares solution, exact if the old width is d or more, and the new mean is g·W2'ᵀ. Of squares of
gradients only the size is kept (``rescaled_state``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

_SMALLEST_SINGULAR_VALUE = 0.05
"""Directions of W2 whose singular value is below this share of the largest are left out of the least-squares
solution, so that a row's norm stays bounded."""


@dataclass(frozen=True)
class AdaptiveRows:
    """When rows of adaptive tables move, and how.

    Attributes:
        interval: steps from one pass of a bucket to the next.
        warmup: steps before the first pass.
        decay: the share of its utility that a row keeps at a pass.
        hysteresis: the utility of a row counts 1 + hysteresis times for the width that it has.
        on_move: ``project`` keeps a row's vector (see above); ``reset`` makes a row that gets narrower zero, as if it
            had been dropped.
        chunk_width: if given, rows are cut into chunks of this many columns, each of which has its own utility, that of
            its own gradient; None moves whole rows.

    Raises:
        ValueError: ``interval`` is below 1, ``warmup`` or ``hysteresis`` below 0, or ``decay`` not between 0 and 1.
    """

    interval: int = 1000
    warmup: int = 1000
    decay: float = 0.5
    hysteresis: float = 0.2
    on_move: Literal["project", "reset"] = "project"
    chunk_width: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("interval", 1, math.inf),
            ("warmup", 0, math.inf),
            ("decay", 0, 1),
            ("hysteresis", 0, math.inf),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise ValueError(f"{name} of adaptive rows is {value}, it must be {limit}")


def choose_pools(
    utility: torch.Tensor,
    held: torch.Tensor,
    permitted: torch.Tensor,
    buckets: torch.Tensor,
    slots: Sequence[int],
    hysteresis: float,
) -> torch.Tensor:
    """Give the slots of each pool, widest first, to the rows of the highest utility that have none yet.

    Args:
        utility: of n rows, ``(n,)`` float32, 0 or more.
        held: the pool that each row is in now, ``(n,)`` int64; -1 for none.
        permitted: the pools that each row may be in, ``(n, P)`` bool.
        buckets: the bucket of each row, ascending ``(n,)`` int64; only the rows of a bucket compete with each other.
        slots: the number of slots of each pool in every bucket.
        hysteresis: the utility of a row that is in a pool, or in a wider one, counts 1 + hysteresis times there.

    Returns:
        The pool of each row ``(n,)`` int64; -1 for none. Rows of equal utility stay where they are; beyond that, the
        first ones come first.
    """
    chosen = torch.full_like(held, -1)
    for pool, number in enumerate(slots):
        holds = (held >= 0) & (held <= pool)
        value = torch.where(holds, utility * (1 + hysteresis), utility)
        candidates = ((chosen < 0) & permitted[:, pool]).nonzero().squeeze(1)
        candidates = candidates[holds[candidates].int().argsort(descending=True, stable=True)]
        candidates = candidates[value[candidates].argsort(descending=True, stable=True)]
        candidates = candidates[buckets[candidates].argsort(stable=True)]
        chosen[candidates[positions_in_groups(buckets[candidates]) < number]] = pool
    return chosen


def positions_in_groups(groups: torch.Tensor) -> torch.Tensor:
    """Return the position of each element ``(n,)`` among those of its group, for groups in ascending order."""
    return torch.arange(len(groups), device=groups.device) - torch.searchsorted(groups, groups)


def least_squares_inverse(projection: torch.Tensor) -> torch.Tensor:
    """Return the matrix ``(d, w)`` that turns a vector into values of a row with W2 ``projection`` ``(w, d)``."""
    inverse = torch.linalg.pinv(projection.double(), rtol=_SMALLEST_SINGULAR_VALUE)
    return inverse.to(projection.dtype)


def rescaled_state(state: torch.Tensor, old_width: int, new_width: int) -> torch.Tensor:
    """Return sums of squared gradients of rows that move from one width to another, or Adam's mean of them.

    The gradient of a row is g·W2ᵀ for the gradient g of its vector. As all W2 begin with unit gain, its mean square
    over the columns is about |g|²/w, so the mean of the state is kept, times old width / new width. The weights of the
    steps do not matter, as they are the same for all columns.

    Args:
        state: ``(n, old_width)``, or ``(n,)`` if the optimizer has one number a row.

    Returns:
        ``(n, new_width)`` or ``(n,)``.
    """
    factor = old_width / new_width
    if state.dim() == 1:
        return state * factor
    return (state.mean(dim=1, keepdim=True) * factor).expand(-1, new_width)
