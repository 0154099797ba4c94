"""The dated result of the checks: a page for people, and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MAX_TEXT = 4000


@dataclass(frozen=True)
class Outcome:
    """What became of a check: ``passed`` with what it found, ``skipped`` with the reason, ``failed`` with the error."""

    name: str
    result: str
    text: str
    seconds: float = 0.0
    what: str = ""

    @property
    def first_line(self) -> str:
        """The first line of the text."""
        return (self.text.splitlines() or [""])[0]


def write(path: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write ``path`` with the suffixes .md and .json, and replace earlier ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"about": dict(about), "checks": [asdict(each) for each in outcomes]}
    Path(f"{path}.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(_page(about, outcomes), encoding="utf-8")


def _page(about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    counts = {kind: sum(each.result == kind for each in outcomes) for kind in ("passed", "failed", "skipped")}
    lines = [
        f"# Checks on {about['device']}, {about['date']}",
        "",
        "Command: `python -m tests.gpu.run_checks`. "
        + ", ".join(f"{number} {kind}" for kind, number in counts.items())
        + ".",
        "",
        *(f"- {name}: {value}" for name, value in about.items() if name not in ("date", "device")),
        "",
        "| check | result | s | what was found |",
        "|---|---|--:|---|",
    ]
    for each in outcomes:
        found = each.first_line.replace("|", "\\|")
        lines.append(f"| `{each.name}` {each.what} | {each.result} | {each.seconds:.1f} | {found} |")
    for each in outcomes:
        if each.result == "failed":
            lines += ["", f"## {each.name}", "", "```text", each.text[-_MAX_TEXT:], "```"]
    return "\n".join(lines) + "\n"
