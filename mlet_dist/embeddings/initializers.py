"""Initial values that depend on seed, table and row only, so that any number of ranks starts from the same model."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class RowInitializer:
    """Fills rows of one weight; a TorchRec ``init_fn`` that also knows how to fill a row-wise shard.

    The weight is drawn in blocks of rows, each from a generator of its own, on the CPU and in float32, whatever the
    device and dtype of the target: a shard draws only the blocks that it overlaps.

    Args:
        name: the weight's name; two names draw different values.
        num_rows: rows of the whole weight.
        distribution: ``uniform`` over [-scale, scale), or ``normal`` with standard deviation ``scale``.
        scale: half-width or standard deviation.
        seed: the run's seed.
        center: the middle of the distribution.
        dtype: what the values are rounded to, even where they are stored wider.
    """

    name: str
    num_rows: int
    distribution: Literal["uniform", "normal"]
    scale: float
    seed: int
    center: float = 0.0
    dtype: torch.dtype = torch.float32

    def __call__(self, weight: torch.Tensor) -> None:
        """Fill the whole weight, ``(num_rows, dim)``."""
        self.fill(weight, first_row=0)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Fill a shard ``(rows, dim)`` with rows ``first_row`` … ``first_row + rows - 1`` of the whole weight.

        Raises:
            ValueError: the shard does not lie inside the weight.
        """
        rows = weight.shape[0] if weight.numel() else 0
        last_row = first_row + rows
        if first_row < 0 or last_row > self.num_rows:
            raise ValueError(f"{self.name}: rows {first_row}..{last_row} do not lie inside 0..{self.num_rows}")
        if rows == 0:
            return
        for start in range(first_row - first_row % _BLOCK_ROWS, last_row, _BLOCK_ROWS):
            block = self._draw(start, min(_BLOCK_ROWS, self.num_rows - start), weight.shape[1])
            block = block.to(self.dtype)
            begin, end = max(start, first_row), min(start + block.shape[0], last_row)
            weight[begin - first_row : end - first_row].copy_(block[begin - start : end - start])

    def _draw(self, start: int, rows: int, dim: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        block = torch.empty(rows, dim)
        if self.distribution == "uniform":
            return block.uniform_(self.center - self.scale, self.center + self.scale, generator=generator)
        return block.normal_(self.center, self.scale, generator=generator)
