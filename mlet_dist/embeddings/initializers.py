"""Initial values that depend on seed, table and row only, so any number of ranks starts from the same model."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class RowInitializer:
    """A TorchRec ``init_fn`` that can also fill a row-wise shard of a weight.

    The weight is drawn in blocks of 8,192 rows on the CPU in float32, each block from its own generator, whatever the
    device and dtype of the target. A shard draws only the blocks that it overlaps.

    Args:
        name: the weight's name; weights of different names get different values.
        num_rows: rows of the complete weight.
        distribution: ``uniform`` over [center - scale, center + scale), or ``normal`` with mean ``center`` and
            standard deviation ``scale``.
        scale: half-width or standard deviation.
        seed: the run's seed.
        center: mean of the distribution.
        dtype: dtype to which values are rounded, even if they are stored in a wider one.
        zero_first_row: whether row 0 is zero; the other rows are the same as without.
    """

    name: str
    num_rows: int
    distribution: Literal["uniform", "normal"]
    scale: float
    seed: int
    center: float = 0.0
    dtype: torch.dtype = torch.float32
    zero_first_row: bool = False

    def __call__(self, weight: torch.Tensor) -> None:
        """Fill the complete weight ``(num_rows, dim)``."""
        self.fill(weight, first_row=0)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Fill a shard ``(rows, dim)`` with rows [first_row, first_row + rows) of the weight.

        Raises:
            ValueError: the shard reaches beyond the weight.
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
        if self.zero_first_row and first_row == 0:
            weight[0].zero_()

    def _draw(self, start: int, rows: int, dim: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        block = torch.empty(rows, dim)
        if self.distribution == "uniform":
            return block.uniform_(self.center - self.scale, self.center + self.scale, generator=generator)
        return block.normal_(self.center, self.scale, generator=generator)


class LeftUndrawn:
    """A TorchRec ``init_fn`` that leaves a weight as it is, because it will be loaded."""

    def __call__(self, weight: torch.Tensor) -> None:
        """Do nothing."""

    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Do nothing."""
