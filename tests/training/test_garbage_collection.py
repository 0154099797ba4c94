"""Garbage is collected between steps alone, by plan, and Python's own collection comes back after them."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from mlet_dist.training.garbage_collection import EVERY, GarbageCollection


class _Cycle:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def _living() -> int:
    return sum(type(each) is _Cycle for each in gc.get_objects())


def _after(step: int) -> Any:
    return SimpleNamespace(step=step)


def _fail_in_a_step(frozen: int) -> None:
    with GarbageCollection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
        raise ValueError("in a step")


@pytest.mark.parametrize("enabled", [True, False])
def test_pythons_own_collection_is_as_before(enabled: bool) -> None:
    frozen = gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="in a step"):
            _fail_in_a_step(frozen)
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_garbage_is_collected_after_every_so_many_steps() -> None:
    with GarbageCollection() as collect:
        for step in (1, EVERY - 1, EVERY + 1):
            for _ in range(10_000):  # more than Python would leave
                _Cycle()
            collect(_after(step))
            assert _living() >= 10_000
        collect(_after(2 * EVERY))
        assert _living() == 0
