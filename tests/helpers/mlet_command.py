"""Runs the `mlet` command as a user does, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def mlet(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m mlet_dist ARGUMENTS` and check its exit code."""
    command = [sys.executable, "-m", "mlet_dist", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == expect, f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    return done


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
