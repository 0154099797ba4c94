"""Ranks of an attempt find one another in a store that earlier attempts have used, with few and short requests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed as dist

from mlet_dist.training.process_group import attempt_store

TIMEOUT = timedelta(seconds=60)


class CountingStore(dist.Store):
    """A store that counts the requests and the bytes of values that it stores or returns."""

    def __init__(self) -> None:
        super().__init__()
        self._inner, self._lock = dist.HashStore(), threading.Lock()
        self.requests: dict[str, int] = {}
        self.bytes = 0

    def _count(self, name: str, size: int = 0) -> None:
        with self._lock:
            self.requests[name] = self.requests.get(name, 0) + 1
            self.bytes += size

    def set(self, key: str, value: Any) -> None:
        self._count("set", len(value))
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        self._count("get", len(value))
        return value

    def add(self, key: str, amount: int) -> int:
        self._count("add" if amount else "poll", 8)
        return self._inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        self._count("check")
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        self._inner.wait(keys, timeout)


def join_all(store: dist.Store, world_size: int, order: list[int] | None = None) -> None:
    """Let all ranks join, and check that they are in one part of the store, which is empty."""

    def join(rank: int) -> None:
        attempt = attempt_store(store, rank, world_size, TIMEOUT)
        assert not attempt.check([f"here/{rank}"])
        attempt.set(f"here/{rank}", "")
        attempt.wait([f"here/{other}" for other in range(world_size)], TIMEOUT)

    with ThreadPoolExecutor(world_size) as pool:
        for each in [pool.submit(join, rank) for rank in order or range(world_size)]:
            each.result()


@pytest.mark.parametrize("world_size", [1, 2, 3, 17])
def test_attempts_that_share_a_store_do_not_meet(world_size: int) -> None:
    store = dist.HashStore()
    join_all(store, world_size)
    join_all(store, world_size, [*range(world_size)][::-1])
    join_all(store, max(1, world_size - 1))


def test_posts_of_ranks_that_have_ended_hinder_nobody() -> None:
    store = dist.HashStore()
    store.add("posts", 2)  # one rank ended before it wrote its post
    store.set("post/1", "a" * 32)
    join_all(store, 3)


def test_a_rank_that_does_not_join_is_waited_for_until_the_timeout() -> None:
    for rank in range(2):
        with pytest.raises(RuntimeError):
            attempt_store(dist.HashStore(), rank, 2, timedelta(seconds=0.3))


def test_requests_and_bytes_grow_with_the_ranks_alone() -> None:
    bytes_of_rank = {}
    for world_size in (8, 64):
        store = CountingStore()
        with ThreadPoolExecutor(world_size) as pool:
            calls = [pool.submit(attempt_store, store, rank, world_size, TIMEOUT) for rank in range(world_size)]
            assert len({call.result().prefix for call in calls if hasattr(call.result(), "prefix")}) <= 1
        ranks = world_size - 1
        assert store.requests["set"] == 2 * ranks  # a post and its answer
        assert store.requests["get"] == 2 * ranks
        assert store.requests["add"] == 3 * ranks
        bytes_of_rank[world_size] = (store.bytes - 8 * store.requests["poll"]) / ranks
    assert bytes_of_rank[64] == bytes_of_rank[8] < 200
