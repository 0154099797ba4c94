"""Nodes find the node 0 of their own attempt, whatever else answers on its port."""

import json
import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from mlet_dist import __version__
from mlet_dist.cluster.nodes import Nodes, job_of, parse_count, port_of
from mlet_dist.cluster.preflight import digest_of_code, facts_of, judge
from mlet_dist.cluster.rendezvous import meet
from mlet_dist.errors import RanksLost, UserError
from tests.cluster.test_wrong_launch import knock
from tests.helpers.mlet_command import ROOT


def nodes(rank: int, port: int, wait: float = 30) -> Nodes:
    return Nodes(fewest=3, count=3, rank=rank, master="localhost", port=port, wait=wait)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        found: int = free.getsockname()[1]
        return found


def nothing_wrong(told: Sequence[dict[str, Any]]) -> str:
    return ""


def test_all_nodes_share_one_store_and_the_first_judges_for_all(port: int) -> None:
    asked: list[list[int]] = []

    def judge_once(told: Sequence[dict[str, Any]]) -> str:
        asked.append([facts["number"] for facts in told])
        return ""

    with ThreadPoolExecutor(3) as pool:
        met = list(pool.map(lambda rank: meet(nodes(rank, port), "job", {"number": rank}, judge_once), (2, 1, 0)))
    met[0].set("said", "by node 2")
    assert met[2].get("said") == b"by node 2"
    assert asked == [[0, 1, 2]]


def test_what_is_wrong_is_raised_on_all_nodes(port: int) -> None:
    def one(rank: int) -> str:
        with pytest.raises(UserError) as caught:
            meet(nodes(rank, port), "job", {}, lambda told: "versions differ")
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == ["versions differ"] * 3


def test_nodes_that_are_there_learn_who_is_missing(port: int) -> None:
    def one(rank: int) -> str:
        with pytest.raises(RanksLost) as caught:
            meet(nodes(rank, port, wait=3), "job", {}, nothing_wrong)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        said = set(pool.map(one, (0, 2)))
    (line,) = said
    assert line.startswith(f"node 1 of 3 did not come to localhost:{port} within 3 s")


def test_what_is_left_of_an_earlier_attempt_is_not_joined(port: int) -> None:
    old = dist.TCPStore("localhost", port, None, True, timedelta(seconds=30), wait_for_workers=False)
    left = dist.PrefixStore("job", old)
    left.set("facts/0", json.dumps({"word": "old"}))
    left.set("roster", json.dumps({"words": {"0": "old", "1": "older", "2": "oldest"}}))
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(meet, nodes(rank, port), "job", {}, nothing_wrong) for rank in (1, 2)]
        left.get("facts/1")  # has come, and must go away again
        left.get("facts/2")
        del left, old
        first = meet(nodes(0, port), "job", {}, nothing_wrong)
        first.set("attempt", "new")
        assert [other.result().get("attempt") for other in others] == [b"new", b"new"]


def test_two_nodes_of_one_number_are_told_so(port: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        met = [pool.submit(meet, nodes(rank, port, wait=4), "job", {}, nothing_wrong) for rank in (1, 1, 2, 0)]
        wait(met)
    assert [each.exception() for each in met[2:]] == [None, None]
    (line,) = [str(each.exception()) for each in met[:2] if each.exception() is not None]
    assert "node 0 has begun without this node: has another one --node-rank 1, too" in line


def test_who_waits_less_long_than_node_0_is_told_that_it_waits(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.cluster.rendezvous._ANSWER_SECONDS", 0.5)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, nodes(0, port, wait=4), "job", {}, nothing_wrong)
        knock(port).close()
        with pytest.raises(RanksLost, match=f"node 0 is at localhost:{port}, and waits longer than this node"):
            meet(nodes(1, port, wait=1), "job", {}, nothing_wrong)
        assert "node 2 of 3 did not come" in str(first.exception())


def test_strangers_on_the_port_are_not_heeded(port: int) -> None:
    """Port scanners, health checks, browsers."""
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, nodes(0, port), "job", {}, nothing_wrong)
        strangers = []
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\xff" * 4096, b"\x16\x03\x01" * 99):
            strangers.append(knock(port))
            strangers[-1].sendall(said)
        strangers[1].close()
        others = [pool.submit(meet, nodes(rank, port), "job", {}, nothing_wrong) for rank in (1, 2)]
        first.result().set("attempt", "this")
        assert [other.result().get("attempt") for other in others] == [b"this", b"this"]
    for stranger in strangers:
        stranger.close()


def test_a_job_is_its_command() -> None:
    job = job_of(["train", "a.yaml", "run.dir=x"], 8, "2")
    assert job == job_of(["train", "a.yaml", "run.dir=x"], 8, "2")
    others = [job_of(["train", "a.yaml", "run.dir=y"], 8, "2"), job_of(["train", "a.yaml", "run.dir=x"], 4, "2")]
    others.append(job_of(["train", "a.yaml", "run.dir=x"], 8, "4"))
    assert len({job, *others}) == 4
    assert 20_000 <= port_of(job) < 30_000
    assert port_of(job) != port_of(others[0])


@pytest.mark.parametrize(("text", "count"), [("1", (1, 1)), ("4", (4, 4)), ("2:4", (2, 4))])
def test_number_of_nodes(text: str, count: tuple[int, int]) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["0", "4:2", "0:2", "two", "1:2:3", "-1", ""])
def test_number_of_nodes_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=f"--nnodes {text}: must be a number"):
        parse_count(text)


def facts(name: str, **changed: Any) -> dict[str, Any]:
    same = {"problems": [], "versions": {"torch": "2.13.0"}, "settings": "a", "marks": []}
    return {"name": name, **same, **changed}


def test_judgement_names_who_and_what() -> None:
    assert judge([facts("node 0"), facts("node 1")]) == []
    assert judge([facts("node 0"), facts("node 1", versions={"torch": "2.12.0"})]) == [
        "torch differs: 2.13.0 (node 0), 2.12.0 (node 1); all need the same"
    ]
    assert judge([facts("node 0"), facts("node 1", settings="b"), facts("node 2", settings="b")]) == [
        "node 1 and 1 more reads other settings than node 0: all need the same config file"
    ]
    full = "no space"
    assert judge([facts("node 0", problems=[full]), facts("node 1", problems=[full])]) == [
        "node 0 and 1 more: no space"
    ]


def test_another_commit_is_another_version(tmp_path: Path) -> None:
    with facts_of("node 0", None, "", on_cuda=False) as here:
        assert here["versions"]["mlet-dist"] == f"{__version__}+{digest_of_code(ROOT / 'mlet_dist')}"
    copy = shutil.copytree(ROOT / "mlet_dist", tmp_path / "installed")  # launch/ is no link there
    assert digest_of_code(copy) == digest_of_code(ROOT / "mlet_dist")
    changed = copy / "embeddings" / "exchange.py"
    changed.write_text(changed.read_text() + "\n")
    assert digest_of_code(copy) != digest_of_code(ROOT / "mlet_dist")
