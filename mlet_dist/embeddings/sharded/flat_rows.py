"""Rows of several widths in flat buffers, so that one collective exchanges all of them.

Widths are counted in *units*, their greatest common divisor. Nothing here waits for a device.
"""

from collections.abc import Sequence
from functools import reduce
from math import gcd

import torch

from mlet_dist.embeddings.projection import split_flat


class FlatRows:
    """Gathers rows of W widths from flat buffers.

    Args:
        widths: ascending.
        device: of the buffers.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self.widths = list(widths)
        self._unit = reduce(gcd, widths)
        self._units = torch.tensor([width // self._unit for width in widths], dtype=torch.int64, device=device)

    def gather(
        self,
        flat: torch.Tensor,
        width_of_row: torch.Tensor,
        rows: torch.Tensor,
        width_of_result: torch.Tensor,
        size: int,
    ) -> torch.Tensor:
        """Return some rows of a flat buffer as another one.

        Args:
            flat: rows one after the other, ``(n,)``.
            width_of_row: the position of each row's width among the W.
            rows: the rows to return, by position.
            width_of_result: the position of each of their widths.
            size: of the result.
        """
        units = self._units[width_of_row]
        starts = (units.cumsum(0) - units)[rows]
        sizes = self._units[width_of_result]
        shifts = starts - (sizes.cumsum(0) - sizes)
        number = size // self._unit
        index = torch.arange(number, device=flat.device) + shifts.repeat_interleave(sizes, output_size=number)
        return flat.view(-1, self._unit).index_select(0, index).view(-1)

    def split(self, flat: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the rows of each width, ``(n, width)``, of a buffer with ``counts`` of them, the narrowest first."""
        parts = split_flat(flat, [count * width for count, width in zip(counts, self.widths, strict=True)])
        return [part.view(-1, width) for part, width in zip(parts, self.widths, strict=True)]
