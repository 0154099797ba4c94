"""The `torchx` command, with the entry points of pyproject.toml even if mlet_dist is not installed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.helpers.mlet_command import ROOT

COMPONENTS = "launch/components.py"


def registered(folder: Path) -> dict[str, str]:
    """Return an environment in which TorchX finds the entry points of pyproject.toml, written into ``folder``."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "mlet_dist_entry_points-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlet-dist-entry-points\nVersion: 0\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    python_path = os.pathsep.join([str(ROOT), str(folder)])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": python_path, "PATH": path, "OMP_NUM_THREADS": "1"}


def torchx(*arguments: object) -> list[str]:
    """Return the command line of `torchx ARGUMENTS`."""
    return [sys.executable, "-m", "torchx.cli.main", *map(str, arguments)]


def run_torchx(environment: dict[str, str], *arguments: object, expect: int = 0) -> tuple[str, str]:
    """Run `torchx ARGUMENTS` to its end; return its stdout and stderr."""
    done = subprocess.run(
        torchx(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def last_json(output: str, key: str) -> dict[str, Any]:
    """Return the last JSON object with ``key`` that a node printed."""
    lines = [line[line.index("{") :] for line in output.splitlines() if "{" in line and f'"{key}"' in line]
    found: dict[str, Any] = json.loads(lines[-1])
    return found
