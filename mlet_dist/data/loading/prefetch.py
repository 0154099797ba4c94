"""Iterators that work ahead in background threads; closing an iterator ends its threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREAD_NAME = "mlet-loader"


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Generator[R, None, None]:
    """``map`` on ``threads`` threads: yield results in order, with at most ``ahead`` calls started but not yielded."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def iterate_ahead(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """Yield the items; a thread takes them from their generator, up to ``ahead`` into a queue and one more in hand."""
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=ahead)
    abandoned = Event()

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    queue.put((item, None))
                    if abandoned.is_set():
                        return
            queue.put((None, StopIteration()))
        except BaseException as error:  # raised again by the consumer
            queue.put((None, error))

    thread = Thread(target=produce, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        abandoned.set()
        try:  # A full queue blocks the thread: drain it.
            while True:
                queue.get_nowait()
        except Empty:
            thread.join()
