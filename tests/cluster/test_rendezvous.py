"""Nodes join node 0 of their own attempt, whatever else listens on or connects to its port."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from mlet_dist import __version__
from mlet_dist.cluster.nodes import Nodes, default_port, job_id, parse_node_count
from mlet_dist.cluster.preflight import collect_report, digest_of_code, find_problems
from mlet_dist.cluster.registration import RendezvousRound
from mlet_dist.cluster.rendezvous import Rendezvous
from mlet_dist.errors import RanksLost, UserError
from tests.cluster.test_wrong_launch import connect
from tests.helpers.mlet_command import ROOT


def nodes(rank: int, port: int, wait: float = 30) -> Nodes:
    return Nodes(min_count=3, count=3, rank=rank, master="localhost", port=port, wait=wait)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        found: int = free.getsockname()[1]
        return found


def rendezvous(
    nodes: Nodes, job: str, report: dict[str, Any], find_problems: Callable[[Sequence[dict[str, Any]]], str]
) -> dist.Store:
    return Rendezvous(nodes, job).meet(report, find_problems).store


def no_problem(reports: Sequence[dict[str, Any]]) -> str:
    return ""


def test_all_nodes_share_one_store_and_node_0_compares_the_reports(port: int) -> None:
    calls: list[list[int]] = []

    def find_none(reports: Sequence[dict[str, Any]]) -> str:
        calls.append([report["number"] for report in reports])
        return ""

    with ThreadPoolExecutor(3) as pool:
        stores = list(
            pool.map(lambda rank: rendezvous(nodes(rank, port), "job", {"number": rank}, find_none), (2, 1, 0))
        )
    stores[0].set("key", "from node 2")
    assert stores[2].get("key") == b"from node 2"
    assert calls == [[0, 1, 2]]


def test_a_problem_is_raised_on_all_nodes(port: int) -> None:
    def one(rank: int) -> str:
        with pytest.raises(UserError) as caught:
            rendezvous(nodes(rank, port), "job", {}, lambda reports: "versions differ")
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == ["versions differ"] * 3


def test_nodes_that_joined_report_who_is_missing(port: int) -> None:
    def one(rank: int) -> str:
        with pytest.raises(RanksLost) as caught:
            rendezvous(nodes(rank, port, wait=3), "job", {}, no_problem)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        messages = set(pool.map(one, (0, 2)))
    (line,) = messages
    assert line.startswith(f"node 1 of 3 did not join at localhost:{port} within 3 s")


def test_the_store_of_an_earlier_attempt_is_not_joined(port: int) -> None:
    old = dist.TCPStore("localhost", port, None, True, timedelta(seconds=30), wait_for_workers=False)
    dist.PrefixStore("job", old).set("round", "old")
    left = dist.PrefixStore("job/old", old)
    left.set("report/0", json.dumps({"token": "old"}))
    left.set("roster", json.dumps({"tokens": {"0": "old", "1": "older", "2": "oldest"}}))
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(rendezvous, nodes(rank, port), "job", {}, no_problem) for rank in (1, 2)]
        left.get("report/1")  # the node has joined the old store, and must leave it again
        left.get("report/2")
        del left, old
        first = rendezvous(nodes(0, port), "job", {}, no_problem)
        first.set("attempt", "new")
        assert [other.result().get("attempt") for other in others] == [b"new", b"new"]


def test_two_nodes_of_the_same_rank_are_reported(port: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        joined = [pool.submit(rendezvous, nodes(rank, port, wait=4), "job", {}, no_problem) for rank in (1, 1, 2, 0)]
        wait(joined)
    assert [each.exception() for each in joined[2:]] == [None, None]
    (line,) = [str(each.exception()) for each in joined[:2] if each.exception() is not None]
    assert "node 0 started without this node: another node also has --node-rank 1" in line


def test_a_node_that_waits_less_long_than_node_0_reports_that(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.cluster.registration.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("mlet_dist.cluster.rendezvous.ANSWER_SECONDS", 0.5)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, nodes(0, port, wait=4), "job", {}, no_problem)
        connect(port).close()
        with pytest.raises(RanksLost, match=f"node 0 at localhost:{port} waits longer for other nodes than this node"):
            rendezvous(nodes(1, port, wait=1), "job", {}, no_problem)
        assert "node 2 of 3 did not join" in str(first.exception())


def test_other_connections_to_the_port_are_ignored(port: int) -> None:
    """Port scanners, health checks and browsers connect too."""
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(rendezvous, nodes(0, port), "job", {}, no_problem)
        strangers = []
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\xff" * 4096, b"\x16\x03\x01" * 99):
            strangers.append(connect(port))
            strangers[-1].sendall(data)
        strangers[1].close()
        others = [pool.submit(rendezvous, nodes(rank, port), "job", {}, no_problem) for rank in (1, 2)]
        first.result().set("attempt", "this")
        assert [other.result().get("attempt") for other in others] == [b"this", b"this"]
    for stranger in strangers:
        stranger.close()


def test_nodes_meet_again_at_the_same_node_0_and_a_new_process_joins_them(port: int) -> None:
    everyone = [Rendezvous(nodes(rank, port), "job") for rank in range(3)]

    def meet(rank: int, number: int, cause: str) -> RendezvousRound:
        return everyone[rank].meet({"name": f"n{rank}", "rounds": number, "cause": cause}, no_problem)

    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(meet, range(3), (0, 0, 0), ("new", "new", "new")))
        first[0].store.set("key", "of the first round")
        everyone[1] = Rendezvous(nodes(1, port), "job")  # a pod that was replaced
        second = list(pool.map(meet, range(3), (1, 0, 1), ("unknown", "new", "unknown")))
        third = list(pool.map(meet, range(3), (2, 2, 2), ("unknown", "unknown", "unknown")))
    assert len({each.prefix for each in (*first, *second, *third)}) == 3
    assert [[each.number for each in of_round] for of_round in (first, second, third)] == [[0] * 3, [1] * 3, [2] * 3]
    assert {each.is_unexplained for each in (*first, *second)} == {False}
    assert {each.is_unexplained for each in third} == {True}
    assert third[2].names == ["n0", "n1", "n2"]
    assert not second[1].store.check(["key"])


def test_a_new_node_0_learns_what_the_job_was_to_replace(port: int) -> None:
    everyone = [Rendezvous(nodes(rank, port), "job") for rank in range(3)]

    def meet(rank: int, number: int, before: str, now: str) -> RendezvousRound:
        report = {"rounds": number, "cause": "lost", "run_before": before, "run_now": now}
        return everyone[rank].meet(report, no_problem)

    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(meet, range(3), (1, 1, 1), ("old",) * 3, ("old", "new", "old")))
        second = list(pool.map(meet, range(3), (0, 2, 2), ("new", "old", "old"), ("new", "old", "old")))
    assert {each.has_replaced for each in first} == {False}
    assert {(each.has_replaced, each.run_before) for each in second} == {(True, "old")}


def test_a_stop_ends_the_wait_for_a_node_0_that_does_not_answer(port: int) -> None:
    """Another process listens there, and never answers, as a machine that has vanished."""
    calls = []

    def check_stop() -> None:
        calls.append(time.monotonic())
        if calls[-1] - calls[0] > 1:
            raise KeyboardInterrupt(15)

    with socket.socket() as silent:
        silent.bind(("localhost", port))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Rendezvous(nodes(1, port), "job", check_stop).meet({}, no_problem)
        assert time.monotonic() - started < 10


def test_a_job_is_its_command() -> None:
    job = job_id(["train", "a.yaml", "run.dir=x"], 8, "2")
    assert job == job_id(["train", "a.yaml", "run.dir=x"], 8, "2")
    others = [job_id(["train", "a.yaml", "run.dir=y"], 8, "2"), job_id(["train", "a.yaml", "run.dir=x"], 4, "2")]
    others.append(job_id(["train", "a.yaml", "run.dir=x"], 8, "4"))
    assert len({job, *others}) == 4
    assert 20_000 <= default_port(job) < 30_000
    assert default_port(job) != default_port(others[0])


@pytest.mark.parametrize(("text", "count"), [("1", (1, 1)), ("4", (4, 4)), ("2:4", (2, 4))])
def test_number_of_nodes(text: str, count: tuple[int, int]) -> None:
    assert parse_node_count(text) == count


@pytest.mark.parametrize("text", ["0", "4:2", "0:2", "two", "1:2:3", "-1", ""])
def test_invalid_number_of_nodes(text: str) -> None:
    with pytest.raises(UserError, match=f"--nnodes {text}: must be a number"):
        parse_node_count(text)


def report(name: str, **changed: Any) -> dict[str, Any]:
    same = {"problems": [], "versions": {"torch": "2.13.0"}, "config_sha256": "a", "markers": []}
    return {"name": name, **same, **changed}


def test_problems_name_the_nodes_and_what_is_wrong() -> None:
    assert find_problems([report("node 0"), report("node 1")]) == []
    assert find_problems([report("node 0"), report("node 1", versions={"torch": "2.12.0"})]) == [
        "torch differs: 2.13.0 (node 0), 2.12.0 (node 1); install the same version everywhere"
    ]
    assert find_problems(
        [report("node 0"), report("node 1", config_sha256="b"), report("node 2", config_sha256="b")]
    ) == ["the config of node 1 and 1 more differs from that of node 0; use the same file on all nodes"]
    full = "no space"
    assert find_problems([report("node 0", problems=[full]), report("node 1", problems=[full])]) == [
        "node 0 and 1 more: no space"
    ]


def test_another_commit_is_another_version(tmp_path: Path) -> None:
    with collect_report("node 0", None, "", on_cuda=False) as here:
        assert here["versions"]["mlet-dist"] == f"{__version__}+{digest_of_code(ROOT / 'mlet_dist')}"
    copy = shutil.copytree(ROOT / "mlet_dist", tmp_path / "installed")  # launch/ is a folder there, not a link
    assert digest_of_code(copy) == digest_of_code(ROOT / "mlet_dist")
    changed = copy / "embeddings" / "collection.py"
    changed.write_text(changed.read_text() + "\n")
    assert digest_of_code(copy) != digest_of_code(ROOT / "mlet_dist")
