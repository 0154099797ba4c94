"""Runs an `mlet` command in a new process, from a command that consists of others."""

import shlex
import subprocess
import sys
from contextlib import suppress

_STOP_SECONDS = 30.0


def run_child_command(*arguments: str, stop_seconds: float = _STOP_SECONDS) -> str:
    """Run `mlet ARGUMENTS` in a new process, print it on stderr, and return the last line of its stdout.

    Args:
        arguments: the command line.
        stop_seconds: how long the command may take to end, when this process is interrupted, before it is killed.

    Raises:
        SystemExit: the command failed without a result, and has printed the reason; with its exit code.
        ChildProcessError: a signal killed it.
        KeyboardInterrupt: this process was interrupted; the command has been terminated.
    """
    print("$", shlex.join(["mlet", *arguments]), file=sys.stderr, flush=True)
    # In a session of its own the child does not receive Ctrl-C; this process receives it and ends the child.
    command = [sys.executable, "-m", "mlet_dist", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(stop_seconds)
            child.kill()
            raise
    if child.returncode < 0:
        raise ChildProcessError(f"`mlet {shlex.join(arguments)}` was killed by signal {-child.returncode}")
    lines = output.splitlines()
    if not lines:
        raise SystemExit(child.returncode)
    return lines[-1]
