"""Python's garbage collector between steps, instead of whenever it happens to be due."""

import gc
from types import TracebackType

from mlet_dist.training.state import Training

EVERY = 100
"""Steps between two collections."""


class GarbageCollection:
    """Collects cyclic garbage every ``EVERY`` steps, on all ranks after the same step, and at no other time.

    By default Python decides when to collect. A complete collection looks at all objects of all imported modules, which
    takes hundreds of milliseconds, and all ranks wait for the one that happens to collect. Within the block, those
    objects are left out (``gc.freeze``). What remains is what a step leaves behind: a few objects, none of which
    refers to a tensor.
    """

    def __enter__(self) -> "GarbageCollection":
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __call__(self, training: Training) -> None:
        """Collect if a collection is due; called after each step."""
        if training.step % EVERY == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
