"""Tests of mlet_dist.data.loading.prefetch."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing

import pytest

from mlet_dist.data.loading.prefetch import THREAD_NAME, iterate_ahead, map_ahead


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)] == []


def count(stop: int, taken: list[int]) -> Generator[int, None, None]:
    for number in range(stop):
        taken.append(number)
        yield number


def test_results_come_in_order_whichever_is_done_first() -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 * (number % 3 == 0))
        return number * number

    assert list(map_ahead(slow_at_first, range(20), threads=4, ahead=6)) == [number * number for number in range(20)]


def test_several_threads_work_at_once() -> None:
    together = threading.Barrier(3, timeout=30)
    assert len(list(map_ahead(lambda _: together.wait(), range(6), threads=3, ahead=3))) == 6


def test_no_more_calls_are_started_than_allowed() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        return number

    with closing(map_ahead(work, range(100), threads=2, ahead=5)) as results:
        for number in range(10):
            assert next(results) == number
            assert len(started) <= number + 5


@pytest.mark.parametrize("failing", [0, 7])
def test_an_error_is_raised_in_order_and_ends_the_threads(failing: int) -> None:
    def work(number: int) -> int:
        if number == failing:
            raise KeyError(number)
        return number

    found: list[int] = []
    with pytest.raises(KeyError, match=str(failing)):
        found.extend(map_ahead(work, range(20), threads=3, ahead=5))
    assert found == list(range(failing))


def test_items_are_taken_ahead_and_no_further() -> None:
    taken: list[int] = []
    with closing(iterate_ahead(count(100, taken), ahead=3)) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 30
        while len(taken) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert taken == [0, 1, 2, 3, 4]  # the item yielded, three in the queue and one in hand
        assert list(items) == list(range(1, 100))


def test_a_consumer_that_fails_ends_the_threads_and_closes_the_source() -> None:
    closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    def consume() -> None:
        with closing(iterate_ahead(endless(), ahead=2)) as items:
            for _ in items:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert closed.is_set()


def test_an_error_of_the_source_is_raised_after_its_items() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise KeyError("gone")

    items = iterate_ahead(failing(), ahead=2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
