"""How `mlet train --nproc` ends if it, or one of its ranks, is stopped from outside."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mlet_dist.cluster import attempt
from mlet_dist.cluster.rank_errors import RankAborted, error_of_failure, record_failure, reported_by_another_rank
from mlet_dist.errors import ConnectionLost, UserError
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
NCCL = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def training(
    small_model: tuple[str, ...], folder: Path, *, forked: bool = True
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start `mlet train --nproc 2` with hours of work; yield it and its ranks' process ids, once they train."""
    (folder / "tmp").mkdir()
    command = [*MLET, "train", str(CONFIG), *small_model, "--nproc", "2"]
    command += ["train.epochs=100000", "train.max_steps=null", f"run.dir={folder / 'run'}"]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    with (
        ForkedCommand(command, env=environment, stderr=subprocess.PIPE)
        if forked
        else subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    ) as parent:
        ranks: list[int] = []
        try:
            metrics = folder / "run" / "metrics.jsonl"
            # An interpreter and its ranks import torch, which takes long where other tests compute.
            wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or parent.poll() is not None, 180)
            ranks = children(parent.pid)
            assert len(ranks) == 2
            yield parent, ranks
        finally:
            for pid in filter(alive, [parent.pid, *ranks]):
                os.kill(pid, signal.SIGKILL)


def messages(parent: subprocess.Popen[str]) -> list[str]:
    """Return the lines of stderr that are neither the plan nor progress."""
    return [
        line for line in parent.communicate(timeout=40)[1].splitlines() if not re.match("plan |train |mlet: w", line)
    ]


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary directories, without the cache that torch keeps there."""
    return [path for path in (folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")]


def test_ranks_do_not_outlive_a_killed_parent(small_model: tuple[str, ...], tmp_path: Path) -> None:
    with training(small_model, tmp_path) as (parent, ranks):
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(alive, ranks)), 5)


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (
            signal.SIGTERM,
            75,
            r"mlet: SIGTERM: saved .*/checkpoints/step-\d{8}; run the same command again to resume from it",
        ),
        (
            signal.SIGUSR1,
            75,
            r"mlet: SIGUSR1: saved .*/checkpoints/step-\d{8}; run the same command again to resume from it",
        ),
        (
            signal.SIGINT,
            130,
            "mlet: interrupted; run the same command again to resume from the last checkpoint, or to start",
        ),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT"],
)
def test_a_signal_ends_all_ranks_with_one_line(
    number: int, code: int, line: str, small_model: tuple[str, ...], tmp_path: Path
) -> None:
    # Ctrl-C goes to an interpreter that was started as users start it.
    with training(small_model, tmp_path, forked=number != signal.SIGINT) as (parent, ranks):
        parent.send_signal(number)
        (found,) = messages(parent)
        assert re.fullmatch(line, found)
        assert parent.returncode == code
        assert not any(map(alive, ranks))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("nproc", [(), ("--nproc", "2")], ids=["alone", "ranks"])
def test_a_signal_after_the_run_has_finished_is_ignored(
    nproc: tuple[str, ...], small_model: tuple[str, ...], tmp_path: Path
) -> None:
    """The result is printed, since the same command would refuse to train the finished run again."""
    summary = tmp_path / "run" / "summary.json"
    command = [*MLET, "train", CONFIG, *small_model, f"run.dir={tmp_path / 'run'}", *nproc, "--json"]
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: summary.exists() or process.poll() is not None)
        process.terminate()
        output, errors = process.communicate(timeout=40)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["weights_sha256"] == json.loads(summary.read_text())["weights_sha256"]


def test_a_killed_rank_is_reported_in_one_line(small_model: tuple[str, ...], tmp_path: Path) -> None:
    with training(small_model, tmp_path) as (parent, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        (line,) = messages(parent)
        assert re.match(rf"mlet: error: rank 1 on {socket.gethostname()} was killed by signal 9 \(SIGKILL\)", line)
        assert parent.returncode == 1
        assert not any(map(alive, ranks))
    assert leftovers(tmp_path) == []


def test_an_input_error_of_the_ranks_is_reported_in_one_line(small_model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [*MLET, "train", CONFIG, *small_model, "--nproc", 2]
    command += ["optimizer.learning_rate=1e20", f"run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with ForkedCommand(command, env=environment, stderr=subprocess.PIPE) as parent:
        (line,) = messages(parent)
    assert line.startswith("mlet: error: the training loss of step ")
    assert parent.returncode == 2
    assert leftovers(tmp_path) == []


def test_sigterm_leaves_no_temporary_directory(tmp_path: Path) -> None:
    command = [*MLET, "synth", "--out", str(tmp_path / "data"), "--rows", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as synth:
        wait_until(lambda: list(tmp_path.iterdir()) or synth.poll() is not None)
        synth.terminate()
        assert synth.communicate(timeout=40)[1].splitlines()[-1] == (
            "mlet: terminated; nothing was written, run the command again"
        )
    assert synth.returncode == 143
    assert not list(tmp_path.iterdir())


def failure_of(rank: int, error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ProcessFailure:
    """Return what torch elastic reports of a rank that ends with an error, recorded in ``folder``."""
    file = folder / "attempt_0" / str(rank) / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    try:
        raise error
    except Exception as raised:
        record_failure(raised)
    return ProcessFailure(rank, 1, 1, str(file))


def test_the_rank_that_failed_is_shown_and_not_those_that_lost_their_connection_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = failure_of(0, ConnectionLost("another rank has ended"), tmp_path, monkeypatch)
    failed = failure_of(1, KeyError("boom"), tmp_path, monkeypatch)
    error = error_of_failure(ChildFailedError("mlet", {0: lost, 1: failed}))
    assert str(error) == f"rank 1 on {socket.gethostname()} failed with exit code 1: KeyError: 'boom'"
    assert capsys.readouterr().err.endswith("KeyError: 'boom'\n")
    assert isinstance(error_of_failure(ChildFailedError("mlet", {0: lost})), ConnectionLost)
    wrong_input = failure_of(2, UserError("no such file"), tmp_path, monkeypatch)
    error = error_of_failure(ChildFailedError("mlet", {0: lost, 1: failed, 2: wrong_input}))
    assert (type(error), str(error)) == (UserError, "no such file")


def died(rank: int, pid: int, number: int) -> ProcessFailure:
    """Return what torch elastic reports of a rank that a signal has ended."""
    return ProcessFailure(rank, pid, -number, "/none")


def test_of_ranks_that_nccl_aborted_the_first_is_shown(tmp_path: Path) -> None:
    """Torch elastic knows the second in which it looked; ranks that had to be killed are those that did not wait."""
    folders = {pid: tmp_path / f"{pid}" for pid in (10, 11, 12)}
    for pid, seconds in ((10, 5.75), (11, 5.25), (12, 5.5)):
        folders[pid].mkdir()
        (folders[pid] / "fatal").write_text("Fatal Python error: Aborted")
        os.utime(folders[pid] / "fatal", (seconds, seconds))
    aborted = {rank: died(rank, 10 + rank, signal.SIGABRT) for rank in range(3)}
    failed = ChildFailedError("mlet", aborted | {3: died(3, 13, signal.SIGKILL)})
    error = error_of_failure(failed, on_cuda=True, killed={13}, folders=folders)
    assert isinstance(error, RankAborted)
    assert str(error) == (
        f"rank 1 on {socket.gethostname()} was killed by signal 6 (SIGABRT); NCCL's watchdog does that when another "
        "rank does not answer; rank 3 did not end and had to be killed"
    )


@pytest.mark.parametrize("on_cuda", [False, True])
def test_sigkill_is_the_cause_of_sigabrt_with_nccl(on_cuda: bool) -> None:
    failed = ChildFailedError("mlet", {0: died(0, 10, signal.SIGABRT), 1: died(1, 11, signal.SIGKILL)})
    shown = "rank 1" if on_cuda else "rank 0"
    assert str(error_of_failure(failed, on_cuda=on_cuda)).startswith(f"{shown} on {socket.gethostname()} was killed by")


def test_sigabrt_is_the_cause_of_a_lost_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = failure_of(0, ConnectionLost("another rank has ended"), tmp_path, monkeypatch)
    failed = ChildFailedError("mlet", {0: lost, 1: died(1, 11, signal.SIGABRT)})
    for on_cuda in (False, True):
        assert isinstance(error_of_failure(failed, on_cuda=on_cuda), RankAborted)


def test_ranks_of_a_host_print_the_same_error_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    for rank, text in enumerate(("one", "one", "two")):
        failure_of(rank, UserError(text), tmp_path, monkeypatch)
        reported.append(reported_by_another_rank(UserError(text)))
    assert reported == [False, True, False]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "termination-log"))  # not a file of torchrun
    assert not reported_by_another_rank(UserError("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["attempt_0"]


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("1", "1")])
def test_nccl_ends_a_rank_without_aborting_communicators_unless_you_say_so(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's default; torch elastic would set 1, with which the watchdog may hang."""
    seen = []
    environment = {name: value for name, value in os.environ.items() if name != NCCL} | ({NCCL: given} if given else {})
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(attempt, "elastic_launch", lambda config, program: lambda *_: seen.append(os.environ[NCCL]))
    attempt._launch({"min_nodes": 1, "max_nodes": 1}, 2, tmp_path, ["train"])
    assert seen == [expected]


NOTHING_SAVED = "stopped without saving; run the same command again to resume from the last checkpoint, or to start"


def test_a_job_that_is_stopped_before_it_trains_ends_with_code_75(small_model: tuple[str, ...], tmp_path: Path) -> None:
    """The ranks of `--nproc` import torch meanwhile; the other rank waits in C++ for one that is not started."""
    command = [*MLET, "train", str(CONFIG), *small_model, f"run.dir={tmp_path / 'run'}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with (
        subprocess.Popen([*command, "--nproc", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher,
        subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True) as waiting,
    ):
        try:
            wait_until(lambda: len(children(launcher.pid)) == 2)
            launcher.send_signal(signal.SIGUSR1)
            wait_until(lambda: listens(port))
            waiting.send_signal(signal.SIGTERM)
            assert messages(launcher) == [f"mlet: SIGUSR1: {NOTHING_SAVED}"]
            assert messages(waiting) == [f"mlet: SIGTERM: {NOTHING_SAVED}"]
        finally:
            launcher.kill()
            waiting.kill()
    assert (launcher.returncode, waiting.returncode) == (75, 75)
    assert not (tmp_path / "run").exists()


def children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [pid for pid in map(int, found) if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
