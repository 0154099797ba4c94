"""The watch of a launcher over its ranks, which are processes that sleep here: what it reports, and whom it kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlet_dist.cluster import rank_watch as module
from mlet_dist.cluster.failure import Kind
from mlet_dist.cluster.rank_watch import RankWatch
from mlet_dist.training import attempts, rank_files


class Ranks:
    """Processes in the place of ranks, with their folders, and the watch over them."""

    def __init__(self, folder: Path, stack: ExitStack, **options: bool) -> None:
        self.folder, self.seen = folder, list[tuple[Kind, str]]()
        self.watch = RankWatch([], 60, lambda kind, text: self.seen.append((kind, text)), **options)
        self.watch._children = folder / "children"
        self.watch.watch(folder)
        self.processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
        stack.callback(self.kill)
        self._children()
        for rank, process in enumerate(self.processes):
            self.of(rank).mkdir()
            (self.of(rank) / "process.json").write_text(json.dumps({"rank": rank + 6, "pid": process.pid}))
        stack.enter_context(self.watch)

    def of(self, rank: int) -> Path:
        return self.folder / f"{rank}"

    def _children(self) -> None:
        partial = self.folder / "partial"
        partial.write_text(" ".join(f"{each.pid}" for each in self.processes if each.returncode is None))
        partial.replace(self.folder / "children")

    def send(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def end(self, rank: int, number: int = signal.SIGKILL) -> None:
        """End a process and collect it, as torch elastic does."""
        self.send(rank, number)
        self.collect(rank)

    def collect(self, rank: int) -> None:
        self.processes[rank].wait(30)
        self._children()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """A rank may be stopped for half a second."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(module, "_STOPPED_LOOKS", 10)
    with ExitStack() as stack:
        yield stack


def wait_until_seen(ranks: Ranks) -> tuple[Kind, str]:
    deadline = time.monotonic() + 30
    while not ranks.seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ranks.seen[0]


def test_a_stopped_rank_is_named_and_killed(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack)
    ranks.send(1, signal.SIGSTOP)
    assert wait_until_seen(ranks) == (
        "crash",
        "rank 7 was stopped (SIGSTOP) for 0.5 s, and killed because the other ranks wait for it",
    )
    assert ranks.processes[1].wait(30) == -signal.SIGKILL
    assert ranks.watch.stopped == {ranks.processes[1].pid}
    assert ranks.watch.killed == set()
    assert ranks.processes[0].poll() is None


def test_a_rank_that_continues_in_time_is_not_killed(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack)
    for _ in range(4):
        ranks.send(1, signal.SIGSTOP)
        time.sleep(0.25)
        ranks.send(1, signal.SIGCONT)
        time.sleep(0.1)
    assert ranks.seen == []
    assert ranks.processes[1].poll() is None


def test_a_launcher_that_was_suspended_itself_looks_again(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock is far ahead when it wakes up, and its ranks may continue a moment later."""
    monkeypatch.setattr(module, "_STOPPED_LOOKS", 1_000_000)
    ranks = Ranks(tmp_path, stack)
    ranks.send(1, signal.SIGSTOP)
    time.sleep(1.5)
    assert ranks.seen == []
    ranks.send(1, signal.SIGCONT)
    assert ranks.processes[1].poll() is None


def test_the_only_rank_of_a_job_may_be_stopped(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack, has_peers=False)
    ranks.send(1, signal.SIGSTOP)
    time.sleep(1.5)
    assert ranks.seen == []
    assert ranks.processes[1].poll() is None


def test_a_rank_that_a_debugger_stopped_is_left_alone(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack)
    code = (
        "import ctypes, os, sys, time\n"
        "PTRACE_ATTACH, WALL = 16, 0x40000000\n"
        "rank = int(sys.argv[1])\n"
        "refused = ctypes.CDLL(None).ptrace(PTRACE_ATTACH, rank, None, None)\n"
        "refused or os.waitpid(rank, WALL)  # the rank stops some time after ptrace returned\n"
        "print('refused' if refused else 'attached', flush=True)\n"
        "time.sleep(600)"
    )
    debugger = subprocess.Popen([sys.executable, "-c", code, f"{ranks.processes[1].pid}"], stdout=subprocess.PIPE)
    stack.callback(debugger.kill)
    assert debugger.stdout is not None
    if debugger.stdout.readline() != b"attached\n":
        pytest.skip("this container refuses ptrace")
    assert module._state(ranks.processes[1].pid) == "t"
    time.sleep(1.5)
    assert ranks.seen == []
    debugger.kill()
    debugger.wait()


def test_a_killed_rank_is_reported_with_its_number(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack)
    ranks.end(0)
    assert wait_until_seen(ranks) == ("crash", "rank 6 was killed; see its log")


def test_a_rank_that_succeeded_is_not_reported(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack)
    (ranks.of(0) / attempts.ENDED).touch()
    ranks.end(0)
    time.sleep(0.5)
    assert ranks.seen == []


@pytest.mark.parametrize(("on_cuda", "kind"), [(False, "crash"), (True, "aborted")])
def test_sigabrt_is_a_crash_unless_nccl_may_have_sent_it(
    tmp_path: Path, stack: ExitStack, on_cuda: bool, kind: Kind
) -> None:
    ranks = Ranks(tmp_path, stack, on_cuda=on_cuda)
    (ranks.of(0) / "fatal").write_text("Fatal Python error: Aborted\n\nCurrent thread ...\n")
    ranks.end(0, signal.SIGABRT)
    assert wait_until_seen(ranks) == (kind, "rank 6 was aborted (SIGABRT); see its log")


def test_a_crash_is_reported_and_not_the_rank_that_nccl_aborts_for_it(tmp_path: Path, stack: ExitStack) -> None:
    ranks = Ranks(tmp_path, stack, on_cuda=True)
    (ranks.of(0) / "fatal").write_text("Fatal Python error: Aborted\n")
    ranks.end(0, signal.SIGABRT)
    time.sleep(0.3)
    ranks.end(1)
    assert wait_until_seen(ranks) == ("crash", "rank 7 was killed; see its log")


def test_a_rank_that_recorded_an_error_and_does_not_end_is_reported(tmp_path: Path, stack: ExitStack) -> None:
    """With NCCL, a process that fails may wait for its peers while it ends."""
    ranks = Ranks(tmp_path, stack)
    (ranks.of(1) / "error.json").write_text(json.dumps({"message": {"message": "KeyError: 'boom'"}}))
    assert wait_until_seen(ranks) == ("crash", "rank 7 has failed; see its log")


def test_ranks_that_have_ended_and_are_not_collected_yet_are_not_killed(tmp_path: Path, stack: ExitStack) -> None:
    """The launcher's exit code depends on who ended by itself; torch elastic collects one process after the other."""
    ranks = Ranks(tmp_path, stack)
    ranks.send(0, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while module._state(ranks.processes[0].pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks.watch.kill_all(0)
    assert ranks.processes[1].wait(30) == -signal.SIGKILL
    assert ranks.watch.killed == {ranks.processes[1].pid}


def test_a_rank_records_its_stack_when_it_is_aborted_in_c(tmp_path: Path) -> None:
    """No Python handler runs: another thread holds the interpreter."""
    code = (
        "from mlet_dist.training.rank_files import record_process; import ctypes, os, time\n"
        "record_process(); print('ready', flush=True); ctypes.PyDLL(None).sleep(600)"
    )
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"), "RANK": "3"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert not rank_files.is_aborted(tmp_path)
        process.send_signal(signal.SIGABRT)
        assert process.wait(30) == -signal.SIGABRT
    assert rank_files.is_aborted(tmp_path)
    assert 'File "<string>", line 2 in <module>' in rank_files.fatal_stack(tmp_path)
    assert rank_files.folders_by_process(tmp_path) == {process.pid: rank_files.RankFolder(tmp_path, 3)}
