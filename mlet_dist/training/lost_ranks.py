"""Finds out which ranks are lost when a collective fails: hosts by rank, timeouts and broken connections."""

import json
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed as dist

HUNG = "hung"
"""The file beside a rank's error file that asks its launcher to kill it; it holds the rank's process id."""

_NOTICE_SECONDS = 10.0
_PEER_GONE = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited",
    "connection was likely closed",  # by the store, which ends with the launcher of node 0
)  # fmt: skip


class RankRegistry:
    """The hosts of all ranks, and which of them have noticed that a collective timed out.

    Args:
        store: a store of all ranks, without entries of an earlier attempt.
        rank, world_size: this process, and the number of all.
        timeout: for all ranks to register.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta = timedelta(0)) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        process = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE", ""),
        }
        store.set(f"process/{rank}", json.dumps(process))
        store.wait([f"process/{each}" for each in range(world_size)], timeout)

    def missing(self) -> list[str]:
        """Return ranks with hosts that do not notice within 10 s that a collective timed out; [] if unknown.

        The launchers of these ranks are asked to kill them: they hang, and would not answer a signal to stop.
        """
        others = set(range(self._world_size)) - {self._rank}
        deadline = time.monotonic() + _NOTICE_SECONDS
        try:
            self._store.set(f"noticed/{self._rank}", "")
            while others and time.monotonic() < deadline:
                time.sleep(0.1)
                others = {each for each in others if not self._store.check([f"noticed/{each}"])}
            lost = {each: json.loads(self._store.get(f"process/{each}")) for each in sorted(others)}
        except RuntimeError:  # the store ended with the process that served it
            return []
        for process in lost.values():
            _report_hung(process)
        return [f"rank {each} on {process['host']}" for each, process in lost.items()]


def _report_hung(process: dict[str, Any]) -> None:
    """Write the marker that a launcher on this host looks for; the folder of another host's launcher is not here."""
    error_file = Path(process["error_file"])
    if process["error_file"] and error_file.parent.is_dir():
        with suppress(OSError):
            partial = error_file.with_name(f"{HUNG}.{os.getpid()}")
            partial.write_text(f"{process['pid']}")
            partial.replace(error_file.with_name(HUNG))


def timed_out(error: BaseException) -> bool:
    """Return whether this is gloo's error for a rank that took no part in a collective."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def connection_lost(error: BaseException) -> bool:
    """Return whether this is gloo's, nccl's or the store's error for a process that ended while this one waited."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _PEER_GONE)
