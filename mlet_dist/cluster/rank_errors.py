"""The error of a rank: written by the rank, read by its launcher, and shown once."""

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from mlet_dist.cluster.rank_watch import was_stopped
from mlet_dist.errors import ConnectionLost, Interrupted, RanksLost, UserError
from mlet_dist.training.rank_files import fatal_stack, fatal_time
from mlet_dist.training.signals import STOP_SIGNALS, interrupted_unsaved

_ONE_LINE_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, Interrupted, ConnectionLost, RanksLost)
}


class RankAborted(ChildProcessError):
    """SIGABRT ended a rank, by which NCCL's watchdog ends a rank that waits for another in vain; exit code 1."""


class RanksKilled(ChildProcessError):
    """The launcher killed the ranks, because another node had failed."""


def error_of_failure(
    failed: ChildFailedError,
    *,
    trains: bool = False,
    killed: Collection[int] = (),
    stopped: Collection[int] = (),
    on_cuda: bool = False,
    folders: Mapping[int, Path] = MappingProxyType({}),
) -> Exception:
    """Return the exception that describes why the ranks of this node failed; print the traceback, if there is one.

    Args:
        failed: torch elastic's error.
        trains: whether the ranks run `mlet train`, which stop signals are meant for.
        killed: process ids of ranks that the launcher killed, because others had failed.
        stopped: process ids of ranks that the launcher killed, because they were stopped.
        on_cuda: whether the ranks use NCCL, so that SIGABRT is likely the consequence of another failure.
        folders: the directories of the ranks' error files, by process id.
    """

    def time_of(failure: ProcessFailure) -> float:
        """Return when a rank failed; torch elastic knows the second in which it looked."""
        with suppress(OSError, KeyError):
            return fatal_time(folders[failure.pid])
        return failure.timestamp

    failures = {
        rank: failure
        for rank, failure in failed.failures.items()
        if failure.pid not in killed or isinstance(failure.message, dict)  # it had recorded an error before
    }
    if not failures:
        return RanksKilled("the ranks were killed")
    # When one rank ends, the others fail too: they lose a connection, or torch elastic terminates them.
    rank, failure = min(failures.items(), key=lambda item: (_order_of_cause(item[1], on_cuda), time_of(item[1])))
    message = _message(failure)
    error = _one_line_error(message)
    if error is not None:
        return error
    where = f"rank {rank} on {socket.gethostname()}"
    if failure.pid in stopped:
        return ChildProcessError(f"{where} {was_stopped()}")
    if trains and -failure.exitcode in STOP_SIGNALS:  # it came before the rank could handle it
        return interrupted_unsaved(-failure.exitcode)
    if failure.exitcode < 0:
        is_consequence = on_cuda and failure.exitcode == -signal.SIGABRT
        if not is_consequence and failure.pid in folders:
            print(fatal_stack(folders[failure.pid]), end="", file=sys.stderr)
        hint = ""
        if failure.exitcode == -signal.SIGKILL:
            hint = "; it may have run out of memory, see `dmesg`"
        elif is_consequence:
            hint = "; NCCL's watchdog does that when another rank does not answer" + _not_ended(failed, killed)
        kind = RankAborted if failure.exitcode == -signal.SIGABRT else ChildProcessError
        return kind(f"{where} was killed by signal {-failure.exitcode} ({failure.signal_name()}){hint}")
    if isinstance(failure.message, dict):
        print(failure.message["extraInfo"]["py_callstack"], end="", file=sys.stderr)
        reason = f": {message.removesuffix(': ')}"
    else:
        reason = " and left no error message"
    return ChildProcessError(f"{where} failed with exit code {failure.exitcode}{reason}")


def _order_of_cause(failure: ProcessFailure, on_cuda: bool) -> int:
    """Return a number that is the larger, the likelier the failure is a consequence of another rank's failure."""
    error = _one_line_error(_message(failure))
    if isinstance(error, ConnectionLost):
        return 4
    if error is not None:
        return 0
    if failure.exitcode == -signal.SIGTERM:
        return 5
    if failure.exitcode == -signal.SIGABRT and on_cuda:
        return 3
    return 1 if failure.exitcode < 0 else 2


def _not_ended(failed: ChildFailedError, killed: Collection[int]) -> str:
    """Return which ranks had to be killed: they are not those that waited, or they could not notice that they do."""
    ranks = [f"{rank}" for rank, failure in failed.failures.items() if failure.pid in killed]
    if not ranks:
        return ""
    return f"; rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} did not end and had to be killed"


def _message(failure: ProcessFailure) -> str:
    """Return what ``record_failure`` wrote, or torch elastic's own message if the rank wrote nothing."""
    return failure.message["message"] if isinstance(failure.message, dict) else failure.message


def error_in_logs(logs: Path) -> Exception | None:
    """Return an error that a rank recorded after it had received a signal to stop, unless it only lost a connection."""
    for path in sorted(logs.rglob("error.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            error = _one_line_error(json.loads(path.read_text(encoding="utf-8"))["message"]["message"])
            if error is not None and not isinstance(error, ConnectionLost):
                return error
    return None


def _one_line_error(recorded: str) -> Exception | None:
    """Return the error that a rank recorded, if it is of a class that is shown without a traceback."""
    kind, _, message = recorded.partition(": ")
    return _ONE_LINE_ERRORS[kind](message) if kind in _ONE_LINE_ERRORS else None


def record_failure(error: BaseException) -> None:
    """Write an error of this rank to the file that torch elastic's agent reads."""
    kind = next((kind for kind in _ONE_LINE_ERRORS.values() if isinstance(error, kind)), None)
    if kind is None:
        ErrorHandler().record_exception(error)
        return
    try:  # The file holds the name of a class, and `_one_line_error` knows only these.
        raise kind(str(error)) from None
    except kind as short:  # without the traceback, which torchrun would print
        ErrorHandler().record_exception(short)


def reported_by_another_rank(error: BaseException) -> bool:
    """Return whether another rank that the same torchrun started on this host has already printed this error.

    The ranks use marker files next to the error files of torchrun, which are ``…/attempt_0/RANK/error.json``.
    """
    folder = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent
    if folder.name != os.environ.get("LOCAL_RANK") or not folder.parent.name.startswith("attempt_"):
        return False
    digest = hashlib.sha256(f"{type(error).__name__}: {error}".encode()).hexdigest()
    try:
        (folder.parent / f"reported-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False
