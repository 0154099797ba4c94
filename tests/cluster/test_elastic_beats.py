"""Launchers of an elastic job that were suspended or cut off: each is a process, with a rank that notices nothing."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, tzinfo
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mlet_dist.cluster import attempt, elastic_beats
from mlet_dist.cluster.elastic_beats import ElasticBeats
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rendezvous_rounds import RendezvousRounds
from mlet_dist.cluster.torch_rendezvous import OpenRendezvous
from tests.cluster.test_wrong_launch import free_port
from tests.helpers.fork_server import fork_server

LOST = "node 1 is lost: it has given no sign of life for 2 s; the ranks start again"
TAKEN_FOR_LOST = "the other nodes have taken this one for lost, and started again without it; it joins them"
BEHIND = "ranks that go on 3 s after another node has left them start again"


def node(rank: int, port: int, folder: Path) -> None:
    """Run a launcher of three, whose rank is started when a file ``start`` says so, and joins when another says so."""
    elastic_beats._POLL_SECONDS, elastic_beats._LOST_SECONDS, elastic_beats._LEFT_SECONDS = 0.05, 2.0, 3.0
    with (folder / f"log-{rank}").open("w") as log:
        os.dup2(log.fileno(), 2)
    rounds, ranks = RendezvousRounds(), dict[str, "subprocess.Popen[bytes]"]()
    nodes = Nodes(min_count=2, count=3, rank=rank, master="localhost", port=port, wait=1)
    with ElasticBeats(nodes, "job", rounds, 0, lambda: None):
        while not (folder / "end").exists():
            for file in sorted(folder.glob(f"enter-{rank}-*")):
                rounds.leave()
                rounds.current = file.name.rpartition("-")[2]
                file.unlink()
            for file in sorted(folder.glob(f"start-{rank}-*")):
                ranks[file.name] = subprocess.Popen(["sleep", "600"])
                file.unlink()
            for name, process in [*ranks.items()]:
                if process.poll() is not None:
                    (folder / f"killed-{name}").touch()
                    del ranks[name]
            time.sleep(0.02)
        for process in ranks.values():
            process.kill()
            process.wait()


class Launchers:
    """Two launchers and the store of node 0, which goes on whoever is suspended."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        self._processes: list[BaseProcess] = []
        stack.callback(self._stop)
        for rank in range(2):
            self._processes.append(fork_server().Process(target=node, args=(rank, self.store.port, folder)))
            self._processes[rank].start()

    def ask(self, *names: str) -> None:
        """Let a launcher enter a round (``enter-1-a``) or start a rank (``start-1-a``), and wait until it has."""
        for name in names:
            (self.folder / name).touch()
            self.wait_until(lambda name=name: not (self.folder / name).exists())  # type: ignore[misc]
        time.sleep(0.2)

    def send(self, rank: int, number: int) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def is_killed(self, rank: int, name: str = "a") -> bool:
        return (self.folder / f"killed-start-{rank}-{name}").exists()

    def log(self, rank: int) -> list[str]:
        """Return what a launcher has logged, without times."""
        lines = (self.folder / f"log-{rank}").read_text().splitlines()
        return [line.partition(f"node {rank} of 3: ")[2] for line in lines]

    @staticmethod
    def wait_until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _stop(self) -> None:
        for rank in range(len(self._processes)):
            self.send(rank, signal.SIGCONT)
        (self.folder / "end").touch()
        for process in self._processes:
            process.join(30)
            process.kill()


@pytest.fixture
def launchers(tmp_path: Path) -> Iterator[Launchers]:
    """Two launchers in a round, with a rank each; a node is lost after 2 s."""
    with ExitStack() as stack:
        found = Launchers(tmp_path, stack)
        found.ask("enter-0-a", "enter-1-a", "start-0-a", "start-1-a")
        yield found


def test_a_launcher_that_was_suspended_kills_ranks_that_the_others_have_given_up(launchers: Launchers) -> None:
    launchers.send(1, signal.SIGSTOP)
    launchers.wait_until(lambda: launchers.is_killed(0))
    launchers.ask("enter-0-b", "start-0-b")
    launchers.send(1, signal.SIGCONT)
    launchers.wait_until(lambda: launchers.is_killed(1))
    launchers.ask("enter-1-c", "start-1-c")
    time.sleep(4)
    assert not launchers.is_killed(0, "b"), "the others go on"
    assert not launchers.is_killed(1, "c"), "its ranks of another round do, too"
    assert [launchers.log(rank) for rank in (0, 1)] == [[LOST], [TAKEN_FOR_LOST]]


def test_ranks_that_a_launcher_starts_after_it_was_suspended_are_killed_if_nobody_waits_for_them(
    launchers: Launchers,
) -> None:
    """The nodes have met, and it was suspended before it started its ranks, which would look for others for long."""
    launchers.send(1, signal.SIGSTOP)
    launchers.wait_until(lambda: launchers.is_killed(0))
    launchers.send(1, signal.SIGCONT)
    launchers.wait_until(lambda: launchers.is_killed(1))
    launchers.ask("start-1-late")
    launchers.wait_until(lambda: launchers.is_killed(1, "late"))
    assert launchers.log(1) == [TAKEN_FOR_LOST]


def test_a_short_suspension_costs_nothing(launchers: Launchers) -> None:
    for rank in (1, 0, 1):
        launchers.send(rank, signal.SIGSTOP)
        time.sleep(0.7)
        launchers.send(rank, signal.SIGCONT)
        time.sleep(0.2)
    time.sleep(1.5)
    assert not launchers.is_killed(0)
    assert not launchers.is_killed(1)


def test_ranks_that_go_on_where_another_node_has_left_are_killed_after_a_while(launchers: Launchers) -> None:
    """They save, or the nodes have met again, for another reason, while this one could not take part."""
    launchers.ask("enter-0-b")
    time.sleep(1)
    assert not launchers.is_killed(1), "it may still save"
    launchers.wait_until(lambda: launchers.is_killed(1))
    assert launchers.log(1) == [BEHIND]
    assert not launchers.is_killed(0)


def handler(port: int, rounds: RendezvousRounds, least: int, *, is_host: bool) -> Any:
    """Return a node's rendezvous of two nodes, for which a node is dead after 2 s."""
    places = (OpenRendezvous(rounds).backend, f"localhost:{port}", "job", least, 2, "localhost")
    times = {"last_call_timeout": 1, "join_timeout": 50, "keep_alive_interval": 1, "keep_alive_max_attempt": 2}
    return get_rendezvous_handler(RendezvousParameters(*places, is_host=is_host, **times))


def meet(*handlers: Any) -> None:
    threads = [threading.Thread(target=each.next_rendezvous, daemon=True) for each in handlers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_nodes_that_meet_give_each_round_a_name_of_its_own() -> None:
    port, both, names = free_port(), [RendezvousRounds(), RendezvousRounds()], []
    handlers = [handler(port, rounds, 2, is_host=rank == 0) for rank, rounds in enumerate(both)]
    for _ in range(2):
        meet(*handlers)
        assert both[0].current == both[1].current
        names.append(both[0].current)
    assert "" not in names
    assert names[0] != names[1]
    assert [each.left for each in both] == [[names[0]]] * 2
    for each in handlers:
        each.shutdown()


def test_a_node_that_was_suspended_notices_one_that_meets_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as for ranks
    port, rounds = free_port(), [RendezvousRounds(), RendezvousRounds()]
    staying = handler(port, rounds[0], 1, is_host=True)
    staying.next_rendezvous()
    staying._handler._stop_heartbeats()
    time.sleep(2.5)
    assert staying.num_nodes_waiting() == 0
    joining = handler(port, rounds[1], 2, is_host=False)
    thread = threading.Thread(target=joining.next_rendezvous, daemon=True)
    thread.start()
    Launchers.wait_until(lambda: staying.num_nodes_waiting() == 1)
    staying.next_rendezvous()
    thread.join(60)
    assert rounds[0].current == rounds[1].current != ""
    for each in (staying, joining):
        each.shutdown()


def meet_ahead_of_time(port: int) -> None:
    """Join a rendezvous with a clock that is 20 s ahead."""

    class Ahead(datetime):
        @classmethod
        def now(cls, zone: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(zone) + timedelta(seconds=20)

    dynamic_rendezvous.datetime = Ahead  # type: ignore[misc]
    handler(port, RendezvousRounds(), 2, is_host=False).next_rendezvous()


def test_a_node_whose_clock_is_far_ahead_does_not_disturb_the_others() -> None:
    port = free_port()
    staying = handler(port, RendezvousRounds(), 1, is_host=True)
    staying.next_rendezvous()
    joining = fork_server().Process(target=meet_ahead_of_time, args=(port,))
    joining.start()
    try:

        def has_joined() -> bool:
            assert staying.num_nodes_waiting() == 0
            state = staying._handler._state_holder.state
            return not state.complete and len(state.participants) == 1

        Launchers.wait_until(has_joined)
    finally:
        joining.kill()
    staying.shutdown()


def serve(folder: Path) -> None:
    """Keep the store of node 0."""
    store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    (folder / "partial").write_text(f"{store.port}")
    (folder / "partial").replace(folder / "port")
    time.sleep(600)


def wait_for_node_0(port: int, folder: Path) -> None:
    """Run node 1 of an elastic job, which waits for node 0 in C++, as torch elastic does."""
    elastic_beats._POLL_SECONDS, elastic_beats._GONE_SECONDS = 0.05, 1.5
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 2)
    server = dist.TCPStore("localhost", port, None, False, timedelta(seconds=1))

    def launch(*_: object) -> None:
        while True:
            server.set("key", "")
            (folder / "answered").touch()

    attempt._launch = launch
    nodes = Nodes(min_count=1, count=2, rank=1, master="localhost", port=port, wait=1)
    attempt.run_elastic(1, ["train"], nodes, "job", on_cuda=False)


def test_a_node_ends_with_75_if_node_0_stays_suspended(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = fork_server().Process(target=serve, args=(tmp_path,))
        server.start()
        stack.callback(server.kill)
        Launchers.wait_until((tmp_path / "port").exists)
        waiting = fork_server().Process(target=wait_for_node_0, args=(int((tmp_path / "port").read_text()), tmp_path))
        waiting.start()
        stack.callback(waiting.kill)
        Launchers.wait_until((tmp_path / "answered").exists)
        time.sleep(2)
        assert waiting.exitcode is None, "node 0 answers"
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        waiting.join(30)
        assert waiting.exitcode == 75
    message = (tmp_path / "log").read_text().splitlines()[-1]
    assert message.startswith(f"mlet: error: node 0 at localhost:{(tmp_path / 'port').read_text()} does not answer")
