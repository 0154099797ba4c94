"""W = W1·W2 backwards: any table enters multi-layer training, exactly."""

import math
from dataclasses import dataclass

import torch

from mlet_dist.embeddings.initializers import RowInitializer

FLOOR = 1e-7
"""Singular values below this share of the largest count as unused: from a Gram matrix in float64, which holds their
squares to 2e-16 of the largest, they are known to no better than about 2e-8 of the largest."""


@dataclass(frozen=True)
class Factors:
    """How the rows of a table become W1, and the W2 that goes with it.

    Attributes:
        to_rows: (d, k) float64; W1 = W · to_rows.
        projection: W2 (k, d) float32.
        singular_values: (d,) float64 of W, descending.
        rank: how many of them are above ``FLOOR`` of the largest; in these directions the factors are balanced.
    """

    to_rows: torch.Tensor
    projection: torch.Tensor
    singular_values: torch.Tensor
    rank: int


def factors_of(gram: torch.Tensor, hidden_dim: int, name: str, seed: int, gain: float | None = None) -> Factors:
    """Exact factors of a table W from its Gram matrix alone (MLET paper, arXiv:2006.05623, Theorem 2.1, backwards).

    With W = U·S·Vᵀ and k >= d there are W1 (n, k) and W2 (k, d) with W1·W2 = W. Of all pairs this is the balanced one,
    W1ᵀW1 = W2W2ᵀ = S, which gradient flow keeps::

        WᵀW = V·S²·Vᵀ      W2 = [S^½·Vᵀ; N(0, 1/k)]      W1 = W·V·[S^-½, 0]

    W·V·Vᵀ = W whatever S is, so the product is exact to the rounding of float32 however ill-conditioned W is. Where W
    has nothing (unused directions, down to a table of zeros) S^½ is replaced by sqrt(d/k), the length of a random row
    of W2: W1 is zero there, and W2 is not, so that W1 learns from the first step. The same holds for the k - d
    columns beyond: with both layers zero they would never move.

    Args:
        gram: WᵀW, (d, d) float64.
        hidden_dim: k, at least d.
        name, seed: of the table and the run; they fix the random rows.
        gain: G gives W2ᵀW2 the mean G, the used directions and the random rows each their share, d/k and (k-d)/k, by
            multiplying W1 and dividing W2; the factors are then as our own recipe's (G = kσ²), and not balanced.

    Raises:
        ValueError: k < d, which only tables of rank k reach, or the Gram matrix is not finite.
    """
    d, k = len(gram), hidden_dim
    if k < d:
        raise ValueError(f"table {name!r}: hidden_dim {k} is below its {d} columns; no exact factors of it have fewer")
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
