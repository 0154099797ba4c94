"""One thing that was looked at, and how it is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what was looked at, e.g. ``memory``.
        status: ``ok``; ``warn``: it works, worse than it could; ``fail``: mlet_dist cannot run.
        found: what is there, in one line.
        advice: what to type or change; empty when the status is ``ok``.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def report(result: Mapping[str, Any]) -> str:
    """What ``run_doctor`` found, for people: a line a check, and what to type below those that need it."""
    width = max(len(check["name"]) for check in result["checks"])
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:4}  {check['name']:{width}}  {check['found']}")
        if check["advice"]:
            lines += [f"{'':{width + 8}}{line}" for line in check["advice"].splitlines()]
    lines.append("all in order" if result["ok"] else "something is wrong: see the lines marked fail")
    return "\n".join(lines)
