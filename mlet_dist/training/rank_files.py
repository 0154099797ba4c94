"""Files that a rank leaves beside its error file for the launcher that started it: which process it is, how it died."""

import faulthandler
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

_PROCESS = "process.json"
_FATAL = "fatal"
_ABORTED = "Fatal Python error: Aborted"

_fatal: TextIO | None = None  # it stays open until the process ends


@dataclass(frozen=True)
class RankFolder:
    """The directory of one rank's error file.

    Attributes:
        path: the directory.
        rank: the number of the rank among all ranks of the job.
    """

    path: Path
    rank: int


def record_process() -> None:
    """Record the rank and process id of this process, and from now on the stack at a fatal signal.

    The handler of the signal is in C and needs no interpreter lock, so that it runs whatever the rank waits in. The
    launcher's own view of an exit code is late or lost: torch elastic collects the processes.
    """
    global _fatal
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or "RANK" not in os.environ:
        return
    folder = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent
    with suppress(OSError):
        partial = folder / f"{_PROCESS}.{os.getpid()}"
        partial.write_text(json.dumps({"rank": int(os.environ["RANK"]), "pid": os.getpid()}), encoding="utf-8")
        partial.replace(folder / _PROCESS)
        _fatal = (folder / _FATAL).open("w", encoding="utf-8")
        faulthandler.enable(_fatal, all_threads=False)


def folders_by_process(logs: Path) -> dict[int, RankFolder]:
    """Return the folders of the ranks that have recorded their process ids, by process id.

    Args:
        logs: torch elastic's directory, with a folder for each rank.
    """
    found = {}
    for path in logs.rglob(_PROCESS):
        process = json.loads(path.read_text(encoding="utf-8"))
        found[process["pid"]] = RankFolder(path.parent, process["rank"])
    return found


def fatal_stack(folder: Path) -> str:
    """Return the Python stack at the fatal signal that ended a rank (SIGABRT, SIGSEGV, …); "" if there was none."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder / _FATAL).read_text(encoding="utf-8").partition("\nExtension modules: ")[0]
    return ""


def fatal_time(folder: Path) -> float:
    """Return when that signal came, in seconds since the epoch.

    Raises:
        OSError: the rank has left no such file.
    """
    return (folder / _FATAL).stat().st_mtime


def is_aborted(folder: Path) -> bool:
    """Return whether SIGABRT has ended a rank."""
    return fatal_stack(folder).startswith(_ABORTED)
