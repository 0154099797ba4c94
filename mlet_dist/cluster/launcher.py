"""Starts the ranks of this node with torch elastic, as one node or as one of several."""

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

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.preflight import facts_of, judge
from mlet_dist.cluster.rendezvous import MetNodes, meet, wait_for_first
from mlet_dist.config.sections import Config
from mlet_dist.errors import ConnectionLost, Interrupted, RanksLost, UserError

_SECONDS_TO_SAVE = 600
_ELASTIC_RESTARTS = 10
_ONE_LINE: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, Interrupted, ConnectionLost, RanksLost)
}


def run_ranks(nproc: int, arguments: Sequence[str], nodes: Nodes | None = None, job: str = "") -> None:
    """Run ``python -m mlet_dist ARGUMENTS`` in ``nproc`` ranks on this node and wait for all of them.

    Args:
        nodes: of an elastic job, or such as have met (``MetNodes`` is registered); None where this is the only one.
        job: the nodes' name for it.

    Raises:
        UserError: a rank found a user's mistake.
        Interrupted: the ranks were told to stop, and have saved what they did.
        RanksLost: a rank found that others do not answer, or too few nodes came.
        ChildProcessError: a rank failed otherwise; its traceback has been printed.
        KeyboardInterrupt: this process was told to stop, by the signal that the exception holds.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torch elastic's words about a failure, before ours
    try:
        with tempfile.TemporaryDirectory(prefix="mlet-", ignore_cleanup_errors=True) as logs:
            config = LaunchConfig(
                nproc_per_node=nproc,
                monitor_interval=0.1,
                signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # which the ranks get too
                shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)),
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                **_rendezvous(nodes, job),
            )
            try:
                elastic_launch(config, sys.executable)("-m", "mlet_dist", *arguments)
            except SignalException as stopped:
                raise _what_ranks_said(Path(logs)) or KeyboardInterrupt(stopped.sigval) from None
    except ChildFailedError as failed:
        raise _as_ours(failed) from None
    except RendezvousError as error:
        if nodes is None:
            raise
        raise RanksLost(
            f"fewer than {nodes.fewest} nodes came to {nodes.endpoint} in time (--wait, "
            f"{type(error).__name__}): do all run the same command, and can they reach this host?"
        ) from None


def _rendezvous(nodes: Nodes | None, job: str) -> dict[str, Any]:
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
    found = {"min_nodes": nodes.fewest, "max_nodes": nodes.count, "run_id": job, "rdzv_endpoint": nodes.endpoint}
    if nodes.is_elastic:
        # Nodes that come after the last call join, too: the others are then started again with them.
        how = {
            "is_host": nodes.rank == 0,
            "read_timeout": min(int(nodes.wait), 60),
            "join_timeout": max(int(nodes.wait), 50),  # a node that has gone is missed for 15 s, and then the last call
            "last_call_timeout": min(int(nodes.wait), 15),
        }
        return found | {"rdzv_backend": "c10d", "rdzv_configs": how, "max_restarts": _ELASTIC_RESTARTS}
    return found | {"rdzv_backend": "mlet", "max_restarts": 0}


def record_failure(error: BaseException) -> None:
    """Write an error to the file from which torch elastic's agent of this rank takes it."""
    kind = next((kind for kind in _ONE_LINE.values() if isinstance(error, kind)), None)
    if kind is None:
        ErrorHandler().record_exception(error)
        return
    try:  # The file holds the name of a class, and `_as_ours` knows these alone.
        raise kind(str(error)) from None
    except kind as short:  # without the traceback, which torchrun would show
        ErrorHandler().record_exception(short)


def said_by_another_rank(error: BaseException) -> bool:
    """Whether another rank that the same torchrun started on this host has shown this error, and so need not this one.

    The ranks' error files lie in a directory of torchrun's, ``…/attempt_0/RANK/error.json``.
    """
    folder = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent
    if folder.name != os.environ.get("LOCAL_RANK") or not folder.parent.name.startswith("attempt_"):
        return False
    said = hashlib.sha256(f"{type(error).__name__}: {error}".encode()).hexdigest()
    try:
        (folder.parent / f"said-{said}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False


def _as_ours(failed: ChildFailedError) -> Exception:
    # A rank's end makes the others fail: by a broken connection, or because torch elastic terminates them.
    rank, failure = min(failed.failures.items(), key=lambda item: (_consequence(item[1]), item[1].timestamp))
    said = _said(failure)
    error = _of_one_line(said)
    if error is not None:
        return error
    where = f"rank {rank} on {socket.gethostname()}"
    if failure.exitcode < 0:
        why = "; was there enough memory? (`dmesg` tells)" if failure.exitcode == -signal.SIGKILL else ""
        signalled = f"signal {-failure.exitcode} ({failure.signal_name()})"
        return ChildProcessError(f"{where} was killed by {signalled}{why}")
    if isinstance(failure.message, dict):
        print(failure.message["extraInfo"]["py_callstack"], end="", file=sys.stderr)
        said = f": {said.removesuffix(': ')}"
    else:
        said = " without a word"
    return ChildProcessError(f"{where} failed with exit code {failure.exitcode}{said}")


def _what_ranks_said(logs: Path) -> Exception | None:
    """The error of one line that a rank wrote when it was told to stop."""
    for path in sorted(logs.rglob("error.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            error = _of_one_line(json.loads(path.read_text(encoding="utf-8"))["message"]["message"])
            if error is not None and not isinstance(error, ConnectionLost):
                return error
    return None


def _of_one_line(said: str) -> Exception | None:
    """The error that a rank recorded, where its message is all there is to say."""
    kind, _, message = said.partition(": ")
    return _ONE_LINE[kind](message) if kind in _ONE_LINE else None


def _consequence(failure: ProcessFailure) -> int:
    """How likely it is that another rank's failure brought this one about."""
    error = _of_one_line(_said(failure))
    if isinstance(error, ConnectionLost):
        return 3
    if error is not None:
        return 0
    if failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT):
        return 4
    return 1 if failure.exitcode < 0 else 2


def _said(failure: ProcessFailure) -> str:
    """What ``record_failure`` wrote, or torch elastic's own words where the rank died without a word."""
    return failure.message["message"] if isinstance(failure.message, dict) else failure.message


def launch(
    nproc: int, arguments: Sequence[str], nodes: Nodes | None, job: str, check: Callable[[], Config | None]
) -> None:
    """Run the ranks of this node, once all nodes are there and nothing is wrong on any.

    Args:
        check: what the command will run with; raises what is wrong with it on this node.

    Raises:
        UserError: here or on another node something is wrong; with a fixed number of nodes all of them say so.
        Exception: as ``run_ranks``.
    """
    if nodes is None or nodes.is_elastic:  # the nodes of an elastic job come one by one
        config = check()
        _check_devices(nproc, config)
        if nodes is not None and nodes.rank > 0:
            wait_for_first(nodes)
        run_ranks(nproc, arguments, nodes, job)
        return
    store = _meet(nproc, nodes, job, check)
    MetNodes(nodes, job, store).register()
    run_ranks(nproc, arguments, nodes, job)


def _meet(nproc: int, nodes: Nodes, job: str, check: Callable[[], Config | None]) -> dist.TCPStore:
    config, problem = None, ""
    try:
        config = check()
        _check_devices(nproc, config)
    except UserError as error:
        problem = str(error)
    with facts_of(f"node {nodes.rank}", config, problem, _on_cuda(config)) as facts:
        try:
            return meet(nodes, job, facts, lambda told: "; ".join(judge(told)))
        except RanksLost as lost:
            # Others may never learn of what is wrong here, but whoever reads this log does.
            for mine in facts["problems"]:
                raise UserError(mine) from lost
            raise


def _on_cuda(config: Config | None) -> bool:
    return (config is None or config.train.device != "cpu") and torch.cuda.is_available()


def _check_devices(nproc: int, config: Config | None) -> None:
    if _on_cuda(config) and nproc > torch.cuda.device_count():
        raise UserError(
            f"--nproc {nproc}: this node has {torch.cuda.device_count()} CUDA devices, and a rank takes one"
        )
