"""Exact factors W1·W2 of an existing table W, with which multi-layer training can start from it."""

import math
from dataclasses import dataclass

import torch

from mlet_dist.embeddings.initializers import RowInitializer

FLOOR = 1e-7
"""Singular values below this share of the largest are treated as zero. A float64 Gram matrix holds their squares to
2e-16 of the largest square, so the values themselves are known to about 2e-8 of the largest value at best."""


@dataclass(frozen=True)
class Factors:
    """W2 of a table W, and the matrix that maps W to W1.

    Attributes:
        to_rows: ``(d, k)`` float64; W1 = W · to_rows.
        projection: W2 ``(k, d)`` float32.
        singular_values: those of W in descending order, ``(d,)`` float64.
        rank: the number of singular values above ``FLOOR`` times the largest.
    """

    to_rows: torch.Tensor
    projection: torch.Tensor
    singular_values: torch.Tensor
    rank: int


def factors_of(gram: torch.Tensor, hidden_dim: int, name: str, seed: int, gain: float | None = None) -> Factors:
    """Compute exact factors of a table W from its Gram matrix (the converse of the MLET paper's Theorem 2.1).

    For W = U·S·Vᵀ and k >= d the factors W1 ``(n, k)`` and W2 ``(k, d)`` satisfy W1·W2 = W. Of all such pairs this
    function returns the balanced one, W1ᵀW1 = W2W2ᵀ = S, a property that gradient flow preserves::

        WᵀW = V·S²·Vᵀ      W2 = [S^½·Vᵀ; N(0, 1/k)]      W1 = W·V·[S^-½, 0]

    W·V·Vᵀ = W for any S, so the product is exact up to float32 rounding even if W is ill-conditioned. In directions
    where the singular value of W is zero, S^½ is replaced by sqrt(d/k), the expected length of a random row of W2.
    There W1 is zero and W2 is not, so W1 gets a gradient from the first step. The same holds for the other k - d
    columns of W1; if both layers were zero there, they would never change.

    Args:
        gram: WᵀW, ``(d, d)`` float64.
        hidden_dim: k, at least d.
        name: the table's name; with ``seed`` it determines the random rows of W2.
        seed: the run's seed.
        gain: if given, W1 and W2 are rescaled so that the mean of the diagonal of W2ᵀW2 is this G, of which the nonzero
            directions get d/k and the random rows (k-d)/k. G = kσ² equals the gain of a randomly initialized W2; the
            factors are then not balanced.

    Raises:
        ValueError: k < d, for which only a table of rank k has exact factors, or the Gram matrix is not finite.
    """
    d, k = len(gram), hidden_dim
    if k < d:
        raise ValueError(
            f"table {name!r}: hidden_dim is {k} and the table has {d} columns; exact factors need hidden_dim >= {d}"
        )
    if not gram.isfinite().all():
        raise ValueError(f"table {name!r}: holds values that are not finite, or too large to be squared")
    squares, vectors = torch.linalg.eigh(gram)
    singular = squares.flip(0).clamp(min=0).sqrt()
    vectors = vectors.flip(1)
    rank = int((singular > FLOOR * singular[0]).sum())
    of_random = 1.0 if gain is None else gain
    scale = torch.full((d,), math.sqrt(of_random * d / k), dtype=torch.float64)
    scale[:rank] = singular[:rank].sqrt()
    if gain is not None:
        scale[:rank] *= (gain * d / k / singular[:rank].mean()).sqrt()
    to_rows = torch.zeros(d, k, dtype=torch.float64)
    to_rows[:, :d] = vectors / scale
    projection = torch.empty(k, d)
    projection[:d] = (scale[:, None] * vectors.T).float()
    RowInitializer(f"projections.{name}", k, "normal", math.sqrt(of_random / k), seed).fill(projection[d:], d)
    return Factors(to_rows, projection, singular, rank)
