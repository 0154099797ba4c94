"""Launchers notice a lost node and tell one another why an attempt has failed; each node is a pair of threads here."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest
from torch import distributed as dist

from mlet_dist.cluster import heartbeats as module
from mlet_dist.cluster.failure import Failure, Kind
from mlet_dist.cluster.heartbeats import Heartbeats
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rank_errors import RanksKilled
from mlet_dist.cluster.rank_watch import RankWatch
from mlet_dist.cluster.restarts import RestartLimit, Supervisor
from mlet_dist.cluster.stop_request import StopRequest
from mlet_dist.errors import ConnectionLost


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a store in which three nodes have met; a node is lost after a second."""
    monkeypatch.setattr(module, "_LOST_SECONDS", 1.0)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    dist.PrefixStore("job/a", store).set("roster", json.dumps({}))
    yield store.port
    del store  # it ends with the fixture, and not before


def node(rank: int, port: int, seen: list[Failure]) -> Heartbeats:
    nodes = Nodes(min_count=3, count=3, rank=rank, master="localhost", port=port, wait=1)
    return Heartbeats(nodes, "job/a", ["node 0 on a", "node 1 on b", "node 2 on c"], seen.append)


def test_a_node_that_gives_no_sign_of_life_is_lost_on_all_others(port: int) -> None:
    seen: list[Failure] = []
    with node(0, port, seen) as first, node(1, port, seen) as second:
        with node(2, port, []) as third:
            assert third.wait_for_failure(2.5) is None, "all of them are alive"
        found = [first.wait_for_failure(10), second.wait_for_failure(10)]
    assert found == [Failure("lost", 2, "node 2 on c is lost: it has given no sign of life for 1 s")] * 2
    assert seen == found


def test_the_first_reason_is_told_to_all(port: int) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(rank, port, [])) for rank in range(3)]
        crash = Failure("crash", 1, "node 1 on b: a rank has crashed")
        nodes[1].leave_with(crash, for_good=True)
        nodes[2].tell(Failure("connection", 2, "node 2 on c: a rank has lost its connection"))
        started = time.monotonic()
        nodes[0].leave_with(Failure("connection", 0, "node 0 on a: the same"), for_good=True)
        assert time.monotonic() - started < 5, "the others know it"
        assert [each.wait_for_failure(5) for each in nodes] == [crash] * 3


def test_an_aborted_rank_is_not_the_reason_while_a_node_is_silent(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's watchdog may abort a rank before its peer's machine is found lost, or because the peer was aborted."""
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.4)
    with node(0, port, []) as first, node(1, port, []) as second:
        with node(2, port, []):
            assert first.wait_for_failure(0.5) is None
        second.tell(Failure("aborted", 1, "node 1 on b: rank 1 was aborted (SIGABRT)"))
        found = second.wait_for_failure(20)
    assert found == Failure("lost", 2, "node 2 on c is lost: it has given no sign of life for 1 s")


@pytest.mark.parametrize("kind", ["aborted", "connection"])
def test_the_first_of_several_aborted_ranks_is_told_where_all_nodes_are_alive(port: int, kind: Kind) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(rank, port, [])) for rank in range(3)]
        time.sleep(0.5)
        for rank in (1, 0, 2):
            nodes[rank].tell(Failure(kind, rank, f"{rank}"))
            time.sleep(0.2)
        assert nodes[2].wait_for_failure(20) == Failure(kind, 1, "1")


def test_a_crash_replaces_what_followed_from_it(port: int) -> None:
    with node(0, port, []) as first, node(1, port, []), node(2, port, []):
        first.tell(Failure("aborted", 0, "rank 0 was aborted"))
        crash = Failure("crash", 0, "rank 1 was killed")
        first.tell(crash)
        first.tell(Failure("crash", 0, "rank 2 was killed, too"))
        assert first.wait_for_failure(20) == crash


def test_the_nodes_that_may_be_the_reason_of_a_lost_connection_are_named(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOST_SECONDS", 60.0)
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "_HOLD_CONNECTION_SECONDS", 2.0)
    with node(0, port, []), node(1, port, []) as second:
        with node(2, port, []):
            pass
        second.tell(Failure("connection", 1, "node 1 on b: rank 1 has lost its connection to another rank"))
        found = second.wait_for_failure(20)
    text = "node 1 on b: rank 1 has lost its connection to another rank; no sign of life from node 2 on c"
    assert found == Failure("connection", 1, text)


def test_node_0_keeps_the_store_until_the_others_have_succeeded(port: int) -> None:
    with node(0, port, []) as first, node(1, port, []) as second, node(2, port, []) as third:
        for each in (second, third):
            each.finish()
        first.finish()
        assert [each.failure for each in (first, second, third)] == [None] * 3


def test_a_node_0_that_has_ended_is_noticed_at_once() -> None:
    store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    dist.PrefixStore("job/a", store).set("roster", json.dumps({}))
    with node(1, store.port, []) as second:
        assert second.wait_for_failure(1) is None
        del store
        assert second.wait_for_failure(5) == Failure("lost", 0, "node 0 on a has ended")
        second._threads[0].join(1)
        assert not second._threads[0].is_alive(), "it would connect again, and the library print a stack trace"


def test_a_node_that_was_taken_for_lost_says_so(port: int) -> None:
    with node(0, port, []) as first, node(2, port, []) as third:
        lost = Failure("lost", 2, "node 2 on c is lost: it has given no sign of life for 15 s")
        first.tell(lost)
        assert third.wait_for_failure(5) == lost
        nodes = Nodes(min_count=3, count=3, rank=2, master="localhost", port=port, wait=1)
        limit = RestartLimit(0, lambda: -1)
        supervisor = Supervisor(1, [], nodes, "job", StopRequest(), limit, lambda: False, lambda: True)
        with pytest.raises(ConnectionLost, match="node 2 on c is lost: it has given no sign of life"):
            supervisor._after(RanksKilled("the ranks were killed"), RankWatch((), 1, print), third, "node 2 on c")


def test_failures_are_counted_anew_after_each_checkpoint() -> None:
    steps = iter([-1, -1, 20, 20, 20, 40])
    limit = RestartLimit(2, lambda: next(steps))
    assert [limit.allows_another() for _ in range(6)] == [True, True, True, True, False, True]
