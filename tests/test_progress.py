"""Tests of mlet_dist.progress in a log and on a terminal, with a clock that the tests set."""

import fcntl
import io
import os
import pty
import struct
import termios
from types import SimpleNamespace

import pytest

from mlet_dist import progress as progress_module
from mlet_dist.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_gets_a_line_every_interval_and_one_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train", 40_000, "steps", log_interval=10, stream=stream) as progress:
        clock.now += 9
        progress.update(1000, loss="0.70")
        assert stream.getvalue() == ""
        clock.now += 1
        progress.update(1500, AUC="0.71")
        clock.now += 9
        progress.update(1)
        clock.now += 1
        progress.update(5499, loss="0.51")
        assert len(stream.getvalue().splitlines()) == 2
        clock.now += 20
        progress.update(32_000)
    assert stream.getvalue() == (
        "train 2,500/40,000 steps  250 steps/s  ETA 2:30  loss 0.70  AUC 0.71\n"
        "train 8,000/40,000 steps  400 steps/s  ETA 1:20  loss 0.51  AUC 0.71\n"
        "train 40,000/40,000 steps  1,000 steps/s  loss 0.51  AUC 0.71\n"
        "train 40,000/40,000 steps  1,000 steps/s  loss 0.51  AUC 0.71\n"
    )


@pytest.mark.parametrize(
    ("done", "seconds", "shown"),
    [
        (1, 8, "8 s each  ETA 13:12"),
        (30, 8, "3.8 rows/s  ETA 0:19"),
        (1, 7200, "2:00:00 each  ETA 198:00:00"),
        (99, 9, "11 rows/s  ETA 0:00"),
    ],
)
def test_slow_work_has_a_rate_and_an_eta(done: int, seconds: int, shown: str, clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress("export", 100, "rows", log_interval=0, stream=stream)
    clock.now += seconds
    progress.update(done)
    assert stream.getvalue() == f"export {done}/100 rows  {shown}\n"


def test_work_that_was_found_has_no_part_in_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress("sweep", 10, "runs", log_interval=0, stream=stream)
    progress.update(6, found=True)
    clock.now += 50
    progress.update(1)
    assert stream.getvalue().splitlines()[-1] == "sweep 7/10 runs  50 s each  ETA 2:30"


def test_work_of_unknown_size_has_no_eta(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("read", None, "rows", stream=stream) as progress:
        progress.update(12_345)
        clock.now += 100
    assert stream.getvalue() == "read 12,345 rows  123 rows/s\n"


def test_no_work_still_has_a_final_line(clock: Clock) -> None:
    stream = io.StringIO()
    Progress("read", 7, "rows", stream=stream).close()
    assert stream.getvalue() == "read 0/7 rows  0 rows/s\n"


def test_the_final_line_is_written_once_and_nothing_after_it(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress("read", 7, "rows", log_interval=0, stream=stream)
    progress.close()
    progress.close()
    progress.update(3)
    assert len(stream.getvalue().splitlines()) == 1


def test_an_error_does_not_hide_the_progress(clock: Clock) -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Progress("read", 7, "rows", stream=stream) as progress:
            progress.update(3)
            clock.now += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().startswith("read 3/7 rows")


def test_stderr_is_the_default_and_disabled_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for disable in (True, False):
        with Progress("read", 2, "rows", log_interval=0, disable=disable) as progress:
            progress.update(1, loss="0.5")
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == (0 if disable else 2)


def test_a_closed_stderr_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as closed:
        closed.setattr(progress_module.sys, "stderr", None)
        with Progress("read", 2, "rows", log_interval=0) as progress:
            progress.update(1, loss="0.5")
    assert capsys.readouterr() == ("", "")


def test_a_log_without_a_reader_does_not_end_the_work() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True)
    with Progress("read", 2, "rows", log_interval=0, stream=stream) as progress:
        progress.update(2)


def shown_on_terminal(columns: int, *, disable: bool) -> str:
    """Return all that a terminal of that width receives for 8 of 10 steps, in two updates."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        with Progress("train", 10, "steps", disable=disable, stream=terminal) as progress:
            progress.update(3, loss="0.70")
            progress.update(5, loss="0.51")
        print("end", file=terminal, flush=True)
        received = b""
        while not received.endswith(b"end\r\n"):
            received += screen.read(4096)
    return received.decode().removesuffix("end\r\n")


@pytest.mark.parametrize("columns", [0, 80, 200])
def test_a_terminal_gets_one_bar_that_ends_at_the_count(columns: int) -> None:
    shown = shown_on_terminal(columns, disable=False)
    states = [state for state in shown.replace("\r\n", "\n").split("\r") if state.strip()]
    assert len(states) >= 2
    assert all(state.startswith("train:") for state in states)
    assert "0/10" in states[0]
    assert "80%" in states[-1]
    assert "8.00/10.0" in states[-1]
    assert "loss=0.51" in states[-1]
    assert states[-1].endswith("\n")
    assert all("\n" not in state for state in states[:-1])


def test_a_disabled_terminal_stays_empty() -> None:
    assert shown_on_terminal(80, disable=True) == ""
