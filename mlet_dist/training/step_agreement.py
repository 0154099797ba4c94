"""What the ranks agree on in every step: whether losses and gradients are finite, and when to save or to stop.

One asynchronous all-reduce (MAX) of five integers starts in each forward pass and is read after the following step,
when it has long arrived. It is on the device's own process group, since an all-reduce of gloo takes 2(R - 1) messages
one after the other.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torchrec.sparse.jagged_tensor import _pin_and_move

from mlet_dist.embeddings.sharded.collectives import AsyncAllReduceMax


class Flags(NamedTuple):
    """What a rank's host tells the others; the largest value of each counts.

    Attributes:
        signal: the number of the signal that asks the run to stop, or 0.
        due: 1 if it is time for a checkpoint.
        failed: 1 if a checkpoint could not be written.
    """

    signal: int = 0
    due: int = 0
    failed: int = 0


class StepAgreement:
    """The agreements of consecutive steps.

    Args:
        device: of the codes.

    Attributes:
        flags_of_rank: returns this rank's flags.
        flags: those of all ranks, as of the forward pass of the latest step that has been read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.flags_of_rank: Callable[[], Flags] = Flags
        self.flags = Flags()
        self._pending: deque[tuple[int, AsyncAllReduceMax]] = deque()

    def start(self, step: int, codes: torch.Tensor) -> None:
        """Start to agree on ``codes`` ``(2,)`` int64, of the gradient and the loss, and on flags. A collective call."""
        flags = _pin_and_move(torch.tensor(self.flags_of_rank(), dtype=torch.int64), self._device)
        self._pending.append((step, AsyncAllReduceMax(torch.cat([codes, flags]), None)))

    def read_until(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Yield each step up to ``step`` that has not been read, with its codes; set ``flags``."""
        while self._pending and self._pending[0][0] <= step:
            of_step, agreement = self._pending.popleft()
            gradient, loss, *flags = agreement.read()
            self.flags = Flags(*flags)
            yield of_step, gradient, loss

    def reset(self) -> None:
        """Drop what has not been read."""
        self._pending.clear()
