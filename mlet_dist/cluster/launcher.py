"""Start the ranks of this node with torch elastic, as the only node or as one of several."""

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlet_dist.cluster.hung_ranks import HungRanks
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.preflight import collect_report, find_problems
from mlet_dist.cluster.rendezvous import FixedRendezvous, rendezvous, wait_for_node_0
from mlet_dist.config.config_file import Config
from mlet_dist.errors import ConnectionLost, Interrupted, RanksLost, UserError
from mlet_dist.training.signals import STOP_SIGNALS, interrupted_unsaved

_SHUTDOWN_TIMEOUT_S = 600
_ELASTIC_RESTARTS = 10
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # to the ranks
_ONE_LINE_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, Interrupted, ConnectionLost, RanksLost)
}


def launch(
    nproc: int, arguments: Sequence[str], nodes: Nodes | None, job: str, check: Callable[[], Config | None]
) -> None:
    """Run the ranks of this node, after all nodes have joined and every check has passed.

    Args:
        nproc: the number of ranks on this node.
        arguments: the command line of each rank, after ``python -m mlet_dist``.
        nodes: the nodes of the job; None if this is the only one.
        job: the id of the job.
        check: returns the config that the command will use; raises UserError if the command cannot run on this node.

    Raises:
        UserError: a check failed on this node, or on another one if the number of nodes is fixed: then all nodes
            raise the same error.
        Exception: as ``run_ranks`` raises.
    """
    if nodes is None or nodes.is_elastic:  # the nodes of an elastic job join one by one and are not compared
        config = check()
        _check_devices(nproc, config)
        if nodes is not None and nodes.rank > 0:
            wait_for_node_0(nodes)
        run_ranks(nproc, arguments, nodes, job)
        return
    store = _join_nodes(nproc, nodes, job, check)
    FixedRendezvous(nodes, job, store).register()
    run_ranks(nproc, arguments, nodes, job)


def _join_nodes(nproc: int, nodes: Nodes, job: str, check: Callable[[], Config | None]) -> dist.TCPStore:
    """Check this node, exchange reports with the other nodes, and return the store that all nodes share."""
    config, problem = None, ""
    try:
        config = check()
        _check_devices(nproc, config)
    except UserError as error:
        problem = str(error)
    with collect_report(f"node {nodes.rank}", config, problem, _uses_cuda(config)) as report:
        try:
            return rendezvous(nodes, job, report, lambda reports: "; ".join(find_problems(reports)))
        except RanksLost as lost:
            # The other nodes may never receive this node's problems, so that they must be in this node's log.
            for found in report["problems"]:
                raise UserError(found) from lost
            raise


def _check_devices(nproc: int, config: Config | None) -> None:
    if _uses_cuda(config) and nproc > torch.cuda.device_count():
        raise UserError(
            f"--nproc {nproc}: each rank needs a GPU, but this node has {torch.cuda.device_count()} CUDA devices; "
            "use a smaller --nproc"
        )


def _uses_cuda(config: Config | None) -> bool:
    return (config is None or config.train.device != "cpu") and torch.cuda.is_available()


def run_ranks(nproc: int, arguments: Sequence[str], nodes: Nodes | None = None, job: str = "") -> None:
    """Run ``python -m mlet_dist ARGUMENTS`` in ``nproc`` ranks on this node and wait for all of them.

    Args:
        nproc: the number of ranks on this node.
        arguments: the command line of each rank, after ``python -m mlet_dist``.
        nodes: the nodes of the job; None if this is the only one. If their number is fixed, their
            ``FixedRendezvous`` must be registered.
        job: the id of the job.

    Raises:
        UserError: a rank found an input error.
        Interrupted: the ranks received a signal to stop, and saved a checkpoint if they could.
        RanksLost: a rank found that others do not respond, or too few nodes joined.
        ChildProcessError: a rank failed otherwise; its traceback has been printed.
        KeyboardInterrupt: this process received a signal to stop; the exception holds its number.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torch elastic would log its own report of a failure before our message
    handlers = {number: signal.getsignal(number) for number in _FORWARDED}  # torch elastic leaves its own
    try:
        with (
            tempfile.TemporaryDirectory(prefix="mlet-", ignore_cleanup_errors=True) as logs,
            HungRanks(Path(logs)),
        ):
            config = LaunchConfig(
                nproc_per_node=nproc,
                monitor_interval=0.1,
                signals_to_handle=",".join(number.name for number in _FORWARDED),
                shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_TIMEOUT_S)),
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                **_rendezvous_config(nodes, job),
            )
            try:
                elastic_launch(config, sys.executable)("-m", "mlet_dist", *arguments)
            except SignalException as stopped:
                raise _error_in_logs(Path(logs)) or KeyboardInterrupt(stopped.sigval) from None
    except ChildFailedError as failed:
        raise error_of_failure(failed, trains=list(arguments[:1]) == ["train"]) from None
    except RendezvousError as error:
        if nodes is None:
            raise
        raise RanksLost(
            f"fewer than {nodes.min_count} nodes joined at {nodes.endpoint} in time (--wait {nodes.wait:g}; "
            f"{type(error).__name__}); check that all nodes run the same command and can reach node 0"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _rendezvous_config(nodes: Nodes | None, job: str) -> dict[str, Any]:
    if nodes is None:
        return {
            "min_nodes": 1,
            "max_nodes": 1,
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "localhost",
            "max_restarts": 0,
        }
    common = {"min_nodes": nodes.min_count, "max_nodes": nodes.count, "run_id": job, "rdzv_endpoint": nodes.endpoint}
    if not nodes.is_elastic:
        return common | {"rdzv_backend": FixedRendezvous.BACKEND, "max_restarts": 0}
    # A node that joins after the last call is admitted, too: the ranks of all nodes are then restarted.
    options = {
        "is_host": nodes.rank == 0,
        "read_timeout": min(int(nodes.wait), 60),
        "join_timeout": max(int(nodes.wait), 50),  # a dead node is noticed after 15 s, before the last call
        "last_call_timeout": min(int(nodes.wait), 15),
    }
    return common | {"rdzv_backend": "c10d", "rdzv_configs": options, "max_restarts": _ELASTIC_RESTARTS}


def error_of_failure(failed: ChildFailedError, *, trains: bool = False) -> Exception:
    """Return the exception that describes why the ranks of this node failed; print the traceback, if there is one.

    Args:
        failed: torch elastic's error.
        trains: whether the ranks run `mlet train`, which stop signals are meant for.
    """
    # When one rank ends, the others fail too: they lose a connection, or torch elastic terminates them.
    rank, failure = min(failed.failures.items(), key=lambda item: (_order_of_cause(item[1]), item[1].timestamp))
    message = _message(failure)
    error = _one_line_error(message)
    if error is not None:
        return error
    where = f"rank {rank} on {socket.gethostname()}"
    if trains and -failure.exitcode in STOP_SIGNALS:  # it came before the rank could handle it
        return interrupted_unsaved(-failure.exitcode)
    if failure.exitcode < 0:
        hint = "; it may have run out of memory, see `dmesg`" if failure.exitcode == -signal.SIGKILL else ""
        return ChildProcessError(f"{where} was killed by signal {-failure.exitcode} ({failure.signal_name()}){hint}")
    if isinstance(failure.message, dict):
        print(failure.message["extraInfo"]["py_callstack"], end="", file=sys.stderr)
        reason = f": {message.removesuffix(': ')}"
    else:
        reason = " and left no error message"
    return ChildProcessError(f"{where} failed with exit code {failure.exitcode}{reason}")


def _order_of_cause(failure: ProcessFailure) -> int:
    """Return a number that is the larger, the likelier the failure is a consequence of another rank's failure."""
    error = _one_line_error(_message(failure))
    if isinstance(error, ConnectionLost):
        return 3
    if error is not None:
        return 0
    if failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT):
        return 4
    return 1 if failure.exitcode < 0 else 2


def _message(failure: ProcessFailure) -> str:
    """Return what ``record_failure`` wrote, or torch elastic's own message if the rank wrote nothing."""
    return failure.message["message"] if isinstance(failure.message, dict) else failure.message


def _error_in_logs(logs: Path) -> Exception | None:
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
