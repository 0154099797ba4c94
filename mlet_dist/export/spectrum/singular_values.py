"""Singular values of a table from its Gram matrix, and the ranks and losses that follow from them."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mlet_dist.embeddings.factors import FLOOR

_LEVELS = (0.1, 0.01, 0.001)
_ENERGIES = (0.9, 0.99)
_SUGGESTED_LOSS = 0.1
_COLUMNS = 4  # fbgemm's kernels take a multiple of 4 columns


@dataclass(frozen=True)
class Spectrum:
    """Singular values s of a matrix with d columns, and numbers derived from them.

    Attributes:
        singular_values: (min(n, d),) descending.
        counts: number of values above 0.1, 0.01 and 0.001 of the largest.
        effective_rank: exp of the entropy of s / sum(s) (Roy and Vetterli, 2007); 0 for a table of zeros.
        stable_rank: ||W||_F² / ||W||²; 0 for a table of zeros.
        energy_dims: number of dimensions that contain 90 and 99 % of sum(s²).
        below_floor: number of values below ``FLOOR`` of the largest, which cannot be distinguished from zero.
    """

    singular_values: tuple[float, ...]
    counts: dict[str, int]
    effective_rank: float
    stable_rank: float
    energy_dims: dict[str, int]
    below_floor: int

    @classmethod
    def of_gram(cls, gram: torch.Tensor, num_rows: int) -> "Spectrum":
        """Compute the spectrum of W from WᵀW, float64, and its number of rows; negative eigenvalues are set to zero."""
        d = len(gram)
        squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)[: min(num_rows, d)]
        values = squares.sqrt()
        largest, total = float(values[0]), float(values.sum())
        shares = values[values > 0] / total
        energy = squares.cumsum(0)
        return cls(
            singular_values=tuple(values.tolist()),
            counts={str(level): int((values > level * largest).sum()) for level in _LEVELS},
            effective_rank=math.exp(float(-(shares * shares.log()).sum())) if total else 0.0,
            stable_rank=float(energy[-1] / squares[0]) if largest else 0.0,
            energy_dims={
                f"{share:.0%}": 1 + int((energy < share * energy[-1]).sum()) if largest else 0 for share in _ENERGIES
            },
            below_floor=int((values <= FLOOR * largest).sum()),
        )

    def loss(self, dims: int) -> float:
        """Return the relative Frobenius error of the best approximation of rank ``dims`` (Eckart and Young)."""
        squares = [value * value for value in self.singular_values]
        total = math.fsum(squares)
        return math.sqrt(math.fsum(squares[dims:]) / total) if total else 0.0


def suggest_dim(spectrum: Spectrum, embedding_dim: int) -> int:
    """Return the fewest columns, a multiple of 4, with a loss of at most 0.1 (1 % of the energy); else all."""
    for dims in range(_COLUMNS, embedding_dim, _COLUMNS):
        if spectrum.loss(dims) <= _SUGGESTED_LOSS:
            return dims
    return embedding_dim


def suggest_smaller(plain: Spectrum, weighted: Spectrum | None, embedding_dim: int) -> dict[str, Any]:
    """Suggest an ``embedding_dim`` from the weighted spectrum if there is one, and return it with its two losses.

    ``loss`` and ``weighted_loss`` are the smallest possible ones, each with the projection that is best for it.
    """
    dims = suggest_dim(plain if weighted is None else weighted, embedding_dim)
    return {
        "embedding_dim": dims,
        "loss": plain.loss(dims),
        "weighted_loss": None if weighted is None else weighted.loss(dims),
    }


def balance(rows_gram: torch.Tensor, projection: torch.Tensor) -> dict[str, float]:
    """Return ||W1ᵀW1 - W2W2ᵀ|| in the Frobenius norm, ``absolute`` and ``relative`` to the larger of the two.

    Args:
        rows_gram: W1ᵀW1 (k, k) float64.
        projection: W2 (k, d).
    """
    other = projection.double() @ projection.double().T
    difference = float((rows_gram - other).norm())
    larger = max(float(rows_gram.norm()), float(other.norm()))
    return {"absolute": difference, "relative": difference / larger if larger else 0.0}
