"""A pool of worker processes that returns results in order and keeps only a few calls waiting."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa

from mlet_dist.errors import UserError

Result = TypeVar("Result")

_UNGUARDED = (
    "prepare was called while a worker process imported the main script; call it only under "
    '`if __name__ == "__main__":`'
)


class WorkerKilledError(UserError):
    """A worker process was killed, as the system does when memory is short, or none could start."""


def check_main_guard() -> None:
    """Raise UserError in a worker process that is still importing the main script."""
    # multiprocessing makes the same check; there is no public function for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(_UNGUARDED)


class Workers:
    """A pool of worker processes. With ``processes`` = 1 there are none, and calls run in this process."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            # Not fork, which pyarrow's threads do not survive.
            context = multiprocessing.get_context("spawn")
            self._started = context.Event()
            self._pool = ProcessPoolExecutor(
                processes, mp_context=context, initializer=_start, initargs=(self._started,)
            )

    def map(
        self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], *, at_once: int | None = None
    ) -> Iterator[Result]:
        """Yield ``function(*call)`` for each call, in order.

        At most ``at_once`` + 2 calls (by default the number of processes + 2) are taken before the first result is
        yielded.

        Raises:
            WorkerKilledError: a worker process was killed, or none could start.
        """
        if self._pool is None:
            for call in calls:
                yield function(*call)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for call in calls:
                waiting.append(self._pool.submit(function, *call))
                if len(waiting) > (at_once or self.processes) + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkerKilledError(
                "a worker process of mlet prepare was killed, probably because memory is short; pass a smaller --memory"
                if self._started.is_set()
                else f"no worker process of mlet prepare could start; {_UNGUARDED}"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start(started: Event) -> None:
    """Set a new worker process up: it leaves Ctrl-C to its parent, and ends when the parent ends, even by kill -9."""
    pa.set_cpu_count(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    Thread(target=exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    started.set()
