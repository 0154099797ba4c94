"""Runs the `mlet` command as a user does, in a process of its own.

The process is forked from one that has imported torch, which takes seconds. Ranks that the command starts are new
processes, as always. Tests of what the command does before it imports torch start it by themselves.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.fork_server import fork_server

ROOT = Path(__file__).parents[2]

_TIMEOUT_SECONDS = 240


def mlet(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `mlet ARGUMENTS` and check its exit code."""
    texts = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "stdout", Path(folder) / "stderr"
        process = fork_server().Process(target=_run, args=(texts, dict(os.environ), *map(str, files)))
        process.start()
        process.join(_TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        output, errors = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
        code = process.exitcode
    assert code == expect, f"exit code {code}, expected {expect} of mlet {' '.join(texts)}\n{output}\n{errors}"
    return subprocess.CompletedProcess(texts, code, output, errors)


def _run(arguments: list[str], environment: Mapping[str, str], stdout: str, stderr: str) -> None:
    """Become the process of a command: with its environment, directory, arguments and output files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["mlet", *arguments]
    from mlet_dist.__main__ import main

    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


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
