"""Holds ranks in a call of C that keeps the interpreter and answers no signal, as a rank that waits for a GPU may be.

A command with ``HOLD`` in its environment imports this module in each rank: when the file of a rank appears in that
directory, a thread of the rank enters the call and never leaves it. The rank's other threads run until they need the
interpreter: a collective ends, and its result or error is never seen.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

HOLD = "TESTS_HOLD_RANKS"


def hold(folder: Path, ranks: list[int], *, once: bool = False) -> None:
    """Hold these ranks, and wait until they are; ``once``: and not those that are started in their places."""
    for rank in ranks:
        (folder / f"hold-{rank}").touch()
    deadline = time.monotonic() + 60
    while not all((folder / f"held-{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if once:
        for rank in ranks:
            (folder / f"hold-{rank}").unlink()


def _wait(folder: Path, rank: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not (folder / f"hold-{rank}").exists():
        time.sleep(0.02)
    sleep = ctypes.PyDLL(None).sleep
    (folder / f"held-{rank}").touch()
    while True:
        sleep(1_000_000)


if HOLD in os.environ and "MLET_LAUNCHED" in os.environ and "RANK" in os.environ:
    threading.Thread(target=_wait, args=(Path(os.environ[HOLD]), os.environ["RANK"]), daemon=True).start()
