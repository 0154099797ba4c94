"""Starts `python -m mlet_dist`, torchrun, benchmarks and examples without the seconds that importing torch takes.

The process is forked from one that has imported torch, and forks the ranks and commands that it starts in turn. In all
else it is as a new process: it has the environment, files, signals, session and exit code that it would have. Tests of
what a command does before it has imported torch start an interpreter.
"""

import functools
import gc
import importlib
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers import held_ranks
from tests.helpers.fork_server import fork_server
from tests.helpers.held_ranks import HOLD

ROOT = Path(__file__).parents[2]
MLET = (sys.executable, "-m", "mlet_dist")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

_MODULES = ("mlet_dist", "torch.distributed.run", "tests.helpers.export_units")
_SCRIPTS = (ROOT / "benchmarks", ROOT / "docs")


class ForkedCommand(subprocess.Popen[str]):
    """``Popen`` for a command line of one of ``_MODULES`` or a file of ``_SCRIPTS``; it is forked in ``ROOT``."""

    def __init__(self, args: Sequence[object], **options: Any) -> None:
        self._options = options
        super().__init__([*map(str, args)], text=True, **options)

    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        assert _program(args) is not None, args
        pipes = _pipes(more)
        files = [_File(pipes[number]) for number in (3, 5)]
        target = (args, _environment(self._options), *files, bool(self._options.get("start_new_session")))
        self._process: BaseProcess = fork_server().Process(target=_run, args=target)
        self._process.start()
        assert self._process.pid is not None
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


class _File:
    """A file descriptor, or -1, that is passed to a child of the fork server."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return (_File, (-1,)) if self.number == -1 else (_received, (reduction.DupFd(self.number),))


def _received(file: Any) -> _File:
    return _File(file.detach())


class _ForkedChild(subprocess.Popen[str]):
    """``Popen`` in a forked process: it forks the process again for a rank or a command."""

    def __init__(self, args: Sequence[str], *more: Any, **options: Any) -> None:
        self._options = options
        super().__init__(args, *more, **options)

    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        if _program(args) is None:
            super()._execute_child(args, *more)  # type: ignore[misc]
            return
        pipes, environment = _pipes(more), _environment(self._options)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.chdir(self._options.get("cwd") or ".")
            _become(args, environment, pipes[3], pipes[5], bool(self._options.get("start_new_session")))
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _program(args: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the module or file that a command line runs and its arguments, if it is one that can be forked."""
    words = [*args]
    if words[:1] != [sys.executable]:
        return None
    words = words[2:] if words[1:2] == ["-u"] else words[1:]
    if words[:1] == ["-m"] and words[1] in _MODULES:
        return words[1], words[2:]
    return (words[0], words[1:]) if words and Path(words[0]).parent in _SCRIPTS else None


def _pipes(more: Sequence[Any]) -> Sequence[int]:
    """Return p2cread, p2cwrite, c2pread, c2pwrite, errread and errwrite of ``_execute_child``'s arguments."""
    return more[9:15]


def _environment(options: Mapping[str, Any]) -> dict[str, str]:
    return dict(os.environ if options.get("env") is None else options["env"])


def _run(args: Sequence[str], environment: Mapping[str, str], stdout: _File, stderr: _File, new_session: bool) -> None:
    """Become a command as a child of the fork server."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.chdir(ROOT)
    # torch.distributed.elastic asks for the names of its callers, for which inspect looks at all modules several times.
    inspect.stack = functools.partial(inspect.stack, 0)
    subprocess.Popen = _ForkedChild  # type: ignore[misc]
    subprocess_handler.Popen = _ForkedChild  # type: ignore[misc]
    _become(args, environment, stdout.number, stderr.number, new_session)


def _become(
    args: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int, new_session: bool
) -> NoReturn:
    """Run a command line in this process, which was forked for it, as if the process had just been started."""
    gc.freeze()  # an object of the process before, if it were collected now, would close a file of this one
    if new_session:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.NOTSET)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, stdout), (2, stderr)):
        if file != -1:
            os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False, buffering=1) for number in (1, 2))
    if HOLD in os.environ:
        importlib.reload(held_ranks)
    found = _program(args)
    assert found is not None
    program, arguments = found
    sys.argv = [program, *arguments]
    try:
        if program in _MODULES:
            runpy.run_module(program, run_name="__main__")
        else:
            # As Python does, so that a script that needs the repository's root on the path fails here, too.
            sys.path[:] = [str(Path(program).parent), *(each for each in sys.path if each not in ("", str(ROOT)))]
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
