"""Runs `mlet` commands whose output goes to log files, several at a time, and ends them when a sweep is stopped."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlet_dist.errors import Interrupted, UserError
from mlet_dist.openmp import thread_environment

_STOP_SECONDS = 30.0


class LoggedCommands:
    """The commands that a sweep runs. Thread-safe.

    Args:
        workers: how many commands run at the same time; each has its share of the cores.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._of_thread = threading.local()

    def set_environment(self, variables: Mapping[str, str]) -> None:
        """Set environment variables of all commands that this thread will run."""
        self._of_thread.environment = {**os.environ, **variables}

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Interrupted: ``stop`` was called.
        """
        if self._stopped.wait(seconds):
            raise Interrupted("the sweep was stopped")

    def run(self, *arguments: str, log: Path, ranks: int = 1) -> int:
        """Run a command of so many processes, append what it prints to a file, and return its exit code.

        Raises:
            Interrupted: ``stop`` was called.
            OSError: the file cannot be written.
        """
        return self._run(arguments, log, ranks=ranks)[0]

    def result(self, *arguments: str, log: Path) -> dict[str, Any]:
        """Run a command with ``--json`` and return its result; what it prints on stderr is appended to a file.

        Raises:
            UserError: the command failed without a result.
            Interrupted: ``stop`` was called.
            OSError: the file cannot be written.
        """
        code, output = self._run((*arguments, "--json"), log, keep=True)
        lines = output.splitlines()
        if not lines:
            raise UserError(f"`mlet {shlex.join(arguments)}` failed with exit code {code}; {end_of(log)}")
        result: dict[str, Any] = json.loads(lines[-1])
        return result

    def stop(self) -> None:
        """End all commands, which save themselves, and refuse to start others."""
        with self._lock:
            self._stopped.set()
            children = list(self._children)
        for child in children:
            child.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()

    def _run(self, arguments: tuple[str, ...], log: Path, *, ranks: int = 1, keep: bool = False) -> tuple[int, bytes]:
        """Return the exit code, and what was printed on stdout if it is not to go to the log."""
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(['mlet', *arguments])}\n".encode())
            output.flush()
            with self._lock:
                if self._stopped.is_set():
                    raise Interrupted("the sweep was stopped")
                # In a session of its own the command does not receive Ctrl-C; `stop` ends it.
                child = subprocess.Popen(
                    [sys.executable, "-m", "mlet_dist", *arguments],
                    stdout=subprocess.PIPE if keep else output,
                    stderr=output,
                    start_new_session=True,
                    env=self._environment(ranks),
                )
                self._children.add(child)
            try:
                printed, _ = child.communicate()
            finally:
                with self._lock:
                    self._children.discard(child)
        if self._stopped.is_set():
            raise Interrupted("the sweep was stopped")
        return child.returncode, printed or b""

    def _environment(self, ranks: int) -> dict[str, str]:
        """Return the environment of a command, whose ranks have as many threads as cores are left by other workers."""
        environment: dict[str, str] = getattr(self._of_thread, "environment", dict(os.environ))
        # A command that runs alone divides the cores among its ranks by itself.
        return environment | (thread_environment(self._workers * ranks, environment) if self._workers > 1 else {})


def end_of(log: Path) -> str:
    """Return a phrase for messages with the last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"the end of {log}: {lines[-1] if lines else ''}"
