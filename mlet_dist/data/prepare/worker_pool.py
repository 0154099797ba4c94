"""Processes that do pieces of work side by side; results come back in order, and few pieces wait at a time."""

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
    'a script that calls prepare is imported by its processes: have it do so under `if __name__ == "__main__":` only'
)


class WorkerKilledError(UserError):
    """A process was killed, which the system does when memory is short, or could not start."""


def refuse_main_import() -> None:
    """Raise UserError in a process that has not come further than importing the script which started it."""
    # As multiprocessing itself asks, which has no public way to.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(_UNGUARDED)


class Workers:
    """A pool of processes; with one, this process does the work itself."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            # Not fork: pyarrow's threads do not survive it.
            context = multiprocessing.get_context("spawn")
            self._started = context.Event()
            self._pool = ProcessPoolExecutor(
                processes, mp_context=context, initializer=_start, initargs=(self._started,)
            )

    def map(
        self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], *, at_once: int | None = None
    ) -> Iterator[Result]:
        """Yield ``function(*call)`` for each call, in order.

        Few more calls than ``at_once`` (all processes) are taken before the first one is done.

        Raises:
            WorkerKilledError: a process was killed, or none could start.
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
                "a process of mlet prepare was killed, as happens when memory is short; give a smaller --memory"
                if self._started.is_set()
                else f"no process of mlet prepare could start; {_UNGUARDED}"
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
    """In a new process: leave Ctrl-C to the parent, and end when that one ends, be it by kill -9.

    One thread is enough for Arrow: processes are what runs side by side.
    """
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    Thread(target=follow, args=(parent.sentinel,), daemon=True).start()
    started.set()
