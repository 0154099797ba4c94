"""Initial values that depend on seed, table and row only, so any number of ranks starts from the same model."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mlet_dist.embeddings.row_order import RowOrder

ProjectionInit = Literal["normal", "orthogonal"]
"""The distributions of the initial values of W2."""

_BLOCK_ROWS = 8192
_MAPPED_ROWS = 64 * _BLOCK_ROWS  # whose positions are computed together


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
            block = self.block(start, weight.shape[1])
            begin, end = max(start, first_row), min(start + block.shape[0], last_row)
            weight[begin - first_row : end - first_row].copy_(block[begin - start : end - start])

    def block(self, start: int, dim: int) -> torch.Tensor:
        """Draw the block of rows that begins at row ``start``, a multiple of 8,192: ``(rows, dim)`` on the CPU."""
        block = self._draw(start, min(_BLOCK_ROWS, self.num_rows - start), dim).to(self.dtype)
        if self.zero_first_row and start == 0:
            block[0].zero_()
        return block

    def _draw(self, start: int, rows: int, dim: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        block = torch.empty(rows, dim)
        if self.distribution == "uniform":
            return block.uniform_(self.center - self.scale, self.center + self.scale, generator=generator)
        return block.normal_(self.center, self.scale, generator=generator)


@dataclass(frozen=True)
class OrthogonalInitializer:
    """Fills a weight ``(k, d)`` with a random semi-orthogonal matrix, uniformly distributed, times a scale.

    Args:
        normal: the initializer of a normal weight, which is made orthogonal. The scale is its standard deviation times
            the root of the larger dimension, so that the squares of all values have the sum that they have on average
            in the normal weight.
    """

    normal: RowInitializer

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor) -> None:
        """Fill the complete weight ``(k, d)``."""
        values = torch.empty(weight.shape)
        self.normal(values)
        tall = values.double() if values.shape[0] >= values.shape[1] else values.double().t()
        columns, triangle = torch.linalg.qr(tall)
        columns = columns * triangle.diagonal().sign() * self.normal.scale * math.sqrt(tall.shape[0])
        weight.copy_(columns if tall.shape == values.shape else columns.t())


@dataclass(frozen=True)
class StoredRowInitializer:
    """A TorchRec ``init_fn`` of a weight whose rows are stored in the order of ``row_order``.

    A row gets the value that it would have if rows were stored by id. A shard draws the blocks of 8,192 ids of which it
    stores a row: those of a table with fewer than 10^8 rows nearly all, whatever the number of ranks.

    Args:
        order: of the weight's rows.
        parts: the initializer of each part of the weight.
    """

    order: RowOrder
    parts: tuple[RowInitializer, ...]

    def __call__(self, weight: torch.Tensor) -> None:
        """Fill the complete weight ``(rows, width)``."""
        self.fill(weight, first_row=0)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Fill a shard ``(rows, width)`` with the stored rows [first_row, first_row + rows) of the weight.

        Raises:
            ValueError: the shard reaches beyond the weight.
        """
        rows = weight.shape[0] if weight.numel() else 0
        if first_row < 0 or first_row + rows > self.order.num_rows:
            raise ValueError(
                f"{self.parts[0].name}: rows {first_row}..{first_row + rows} do not lie inside 0..{self.order.num_rows}"
            )
        first_of_part = 0
        for initializer in self.parts if rows else ():
            for start in range(0, initializer.num_rows, _MAPPED_ROWS):
                ids = torch.arange(start, min(start + _MAPPED_ROWS, initializer.num_rows), device="cpu")
                positions = self.order.stored_rows(ids + first_of_part) - first_row
                for begin, of_block in zip(ids[::_BLOCK_ROWS].tolist(), positions.split(_BLOCK_ROWS), strict=True):
                    inside = (of_block >= 0) & (of_block < rows)
                    if bool(inside.any()):
                        drawn = initializer.block(begin, weight.shape[1])[inside]
                        weight[of_block[inside].to(weight.device)] = drawn.to(weight.device, weight.dtype)
            first_of_part += initializer.num_rows


@dataclass(frozen=True)
class GivenInitializer:
    """A TorchRec ``init_fn`` that calls another one, which fills a complete weight in the order of its ids."""

    order: RowOrder
    init_fn: Callable[[torch.Tensor], object]

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor) -> None:
        """Fill a complete weight ``(rows, width)``, or a shard, whose rows ``init_fn`` cannot know."""
        if len(weight) != self.order.num_rows or weight.is_meta:
            self.init_fn(weight)
            return
        by_id = torch.empty_like(weight)
        self.init_fn(by_id)
        weight.copy_(self.order.to_stored(by_id))


class LeftUndrawn:
    """A TorchRec ``init_fn`` that leaves a weight as it is, because it will be loaded."""

    def __call__(self, weight: torch.Tensor) -> None:
        """Do nothing."""

    def fill(self, weight: torch.Tensor, first_row: int) -> None:
        """Do nothing."""
