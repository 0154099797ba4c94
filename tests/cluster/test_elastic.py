"""Nodes of an elastic job (`--nnodes MIN:MAX`) join, are lost and come back, and the others go on from a checkpoint."""

import json
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mlet_dist.cluster import attempt
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rendezvous_rounds import RendezvousRounds
from mlet_dist.cluster.torch_rendezvous import OpenRendezvous
from mlet_dist.errors import ConnectionLost, NodesMissing
from tests.cluster.test_restarts import Job, job
from tests.cluster.test_wrong_launch import free_port
from tests.conftest import TrainedRun
from tests.helpers.held_ranks import HOLD, hold

pytestmark = pytest.mark.e2e

SETTINGS = ("data.batch_size=66", "train.max_steps=null", "train.epochs=100000", "train.checkpoint_every=10")
OPTIONS = ("--nnodes", "2:3", "--wait", 20, *SETTINGS)
NODE = Nodes(min_count=2, count=3, rank=1, master="head", port=29500, wait=20)


def wait_for(nodes: Job, ranks: int) -> None:
    """Wait for a checkpoint that so many ranks have saved, other than those that there are."""
    before = nodes.checkpoints()

    def saved() -> bool:
        for each in nodes.checkpoints() - before:
            with suppress(FileNotFoundError):  # only the last two are kept
                text = (nodes.run / "checkpoints" / each / "manifest.json").read_text()
                if json.loads(text)["content"]["about"]["world_size"] == ranks:
                    return True
        return False

    nodes.wait_until(saved, seconds=240)


def rank_of(nodes: Job, node: int) -> int:
    """Return the number of a node's rank: torch elastic sorts the nodes of one host by their process ids."""
    return sorted(each.pid for each in nodes.nodes.values()).index(nodes.nodes[node].pid)


def test_nodes_join_are_lost_and_come_back(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOLD, str(tmp_path))
    with job(trained, tmp_path, 2, *OPTIONS) as nodes:
        wait_for(nodes, 2)
        nodes.start(2)
        wait_for(nodes, 3)
        nodes.kill_node(2)
        wait_for(nodes, 2)
        nodes.start(2)
        wait_for(nodes, 3)
        hold(tmp_path, [rank_of(nodes, 1)], once=True)  # it does not notice that the others are gone
        nodes.send(1, signal.SIGSTOP)  # as a machine that vanishes: its connections stay open
        wait_for(nodes, 2)
        nodes.send(1, signal.SIGCONT)  # it comes back, and joins
        wait_for(nodes, 3)
        nodes.nodes[1].terminate()  # evicted
        assert nodes.nodes[1].wait(60) == 75
        wait_for(nodes, 2)
        nodes.nodes[0].terminate()  # it must stay: the others end, and are started again by their scheduler
        assert nodes.nodes[0].wait(60) == 75
        assert nodes.nodes[2].wait(120) == 75
        logs = [nodes.log(rank) for rank in range(3)]
    assert len(re.findall("resuming from", logs[0])) >= 6
    assert all("Traceback" not in log for log in logs)
    lost = "node 1 is lost: it has given no sign of life for 15 s; the ranks start again"
    assert [log.count(lost) for log in logs] == [1, 0, 1]
    taken_for_lost = "the other nodes have taken this one for lost, and started again without it; it joins them"
    assert [log.count(taken_for_lost) for log in logs] == [0, 1, 0]
    assert logs[2].splitlines()[-1].startswith("mlet: error: node 0 at localhost:")


@pytest.mark.parametrize(
    ("error", "is_closed"),
    [(RendezvousConnectionError(), False), (DistStoreError(), False), (ValueError(), True), (None, True)],
)
def test_a_node_that_was_cut_off_closes_the_rendezvous_for_no_other(error: Exception | None, is_closed: bool) -> None:
    """torch elastic shuts it down in a `finally`, whatever is raised."""

    def handler(is_host: bool) -> RendezvousHandler:
        places = (OpenRendezvous(RendezvousRounds()).backend, f"localhost:{port}", "job", 1, 2, "localhost")
        return get_rendezvous_handler(RendezvousParameters(*places, is_host=is_host))

    port = free_port()
    staying, leaving = handler(True), handler(False)
    with suppress(*([type(error)] if error else [])):
        try:
            if error is not None:
                raise error
        finally:
            assert leaving.shutdown()
    assert staying.is_closed() is is_closed
    assert staying.get_run_id() == "job"


TOO_FEW = r"fewer than 2 nodes joined at head:29500 in time \(--wait 20\); check that all nodes run the same command"
LOST = "node 0 at head:29500 does not answer any more, or a node was lost while all of them met"


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (RendezvousTimeoutError(), NodesMissing, TOO_FEW),
        (RendezvousClosedError(), ConnectionLost, "the job at head:29500 ended before this node joined it"),
        (RendezvousConnectionError(), ConnectionLost, LOST),
        (DistStoreError(), ConnectionLost, LOST),
    ],
)
def test_what_torch_elastic_raises_becomes_an_exit_code_that_is_not_counted(
    raised: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object) -> None:
        raise raised

    monkeypatch.setattr(attempt, "_launch", launch)
    with pytest.raises(kind, match=message):
        attempt.run_elastic(1, ["train"], NODE, "job", on_cuda=False)
