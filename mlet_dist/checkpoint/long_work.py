"""Work that takes ranks different times, while no rank waits for long in one collective."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from mlet_dist.errors import UserError

T = TypeVar("T")

_AGREE_SECONDS = 1.0


class Advance:
    """Counts the advances of a rank's work, which tell it from work that hangs. Thread-safe."""

    def __init__(self) -> None:
        self._count, self._changed = 0, threading.Condition()
        self.is_finished = False

    def __call__(self) -> None:
        """Say that the work has advanced."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that the work is done."""
        with self._changed:
            self.is_finished = True
            self._changed.notify_all()

    def wait_for_more(self, seen: int) -> int:
        """Wait until the work has advanced beyond ``seen`` or is done, and return the count."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_finished or self._count > seen)
            return self._count

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the work is done, for ``seconds`` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_finished, seconds)


def run_long(work: Callable[[Advance], T]) -> T:
    """Run ``work`` on every rank, and return its result when all ranks have finished. A collective call.

    A collective that only the end of the work joined would time out where one rank has much more to do than others. So
    a thread works, and the ranks agree about every second whether all of them have finished. A rank whose work has not
    advanced takes no part, so that a rank that hangs is found by the timeout of collectives, as in training.

    Args:
        work: called in a thread with an ``Advance``, which it calls at least once in ``train.collective_timeout_s``. It
            must not call collectives.

    Raises:
        UserError: on every rank, once all have finished: ``work`` raised it on some of them.
        Exception: what else ``work`` raised on this rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(Advance())
    advance = Advance()
    result: list[Any] = []
    failure: list[BaseException] = []

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:  # each thread begins with the first
                torch.cuda.set_device(device)
            result.append(work(advance))
        except BaseException as error:
            failure.append(error)
        finally:
            advance.finish()

    threading.Thread(target=run, name="mlet-long-work", daemon=True).start()
    seen, unfinished = 0, torch.ones(1, dtype=torch.int64, device=collective_device())
    while unfinished.item():
        advance.wait_for_end(_AGREE_SECONDS)
        seen = advance.wait_for_more(seen)
        unfinished.fill_(not advance.is_finished)
        dist.all_reduce(unfinished, dist.ReduceOp.MAX)
    messages = _of_all_ranks(str(failure[0]) if failure and isinstance(failure[0], UserError) else None)
    if failure and not isinstance(failure[0], UserError):
        raise failure[0]
    if messages:
        raise UserError("; ".join(messages))
    found: T = result[0]
    return found


def _of_all_ranks(message: str | None) -> list[str]:
    """Return the different messages of all ranks."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return sorted({each for each in messages if each is not None})


def collective_device() -> torch.device:
    """Return the device of tensors that the default process group can reduce; CPU if it can reduce these."""
    backends = dist.get_backend_config()
    if "gloo" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
