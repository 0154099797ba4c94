"""Runs the `mlet` command as a user does, in a process of its own."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from tests.helpers.forked_command import MLET, ROOT, TORCHRUN, ForkedCommand

__all__ = ["ROOT", "error_line", "mlet", "mlet_json", "run_command", "torchrun_mlet"]

_TIMEOUT_SECONDS = 240


def mlet(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `mlet ARGUMENTS` and check its exit code."""
    return run_command([*MLET, *arguments], expect)


def torchrun_mlet(nproc: int, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mlet ARGUMENTS` in ``nproc`` ranks that torchrun starts."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", nproc, "-m", "mlet_dist", *arguments]
    return run_command(command, environment=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def run_command(
    command: Sequence[object], expect: int = 0, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a command that ``ForkedCommand`` can start, and check its exit code."""
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            output, errors = process.communicate(timeout=_TIMEOUT_SECONDS)
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    assert code == expect, f"exit code {code}, expected {expect} of {process.args}\n{output}\n{errors}"
    return subprocess.CompletedProcess(process.args, code, output, errors)


def mlet_json(*arguments: object, expect: int = 0) -> dict[str, Any]:
    """Run a command with `--json` and return the object that it prints as the last line of stdout."""
    done = mlet(*arguments, "--json", expect=expect)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def error_line(*arguments: object) -> str:
    """Run a command with an input error and return the one line that it prints; its exit code must be 2."""
    done = mlet(*arguments, expect=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mlet: error: ")
    assert done.stdout == ""
    return lines[0]
