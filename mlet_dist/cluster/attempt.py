"""Runs the ranks of this node once, with torch elastic."""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlet_dist.cluster.elastic_beats import ElasticBeats
from mlet_dist.cluster.gloo_interface import gloo_interface
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rank_errors import error_in_logs, error_of_failure
from mlet_dist.cluster.rank_watch import RankWatch
from mlet_dist.cluster.rendezvous_rounds import RendezvousRounds
from mlet_dist.cluster.stop_request import FORWARDED, StopRequest
from mlet_dist.cluster.torch_rendezvous import FixedRendezvous, OpenRendezvous
from mlet_dist.errors import ConnectionLost, NodesMissing, print_error
from mlet_dist.node_log import log_of_node
from mlet_dist.openmp import thread_environment
from mlet_dist.training.rank_files import folders_by_process

_SHUTDOWN_TIMEOUT_S = 600
_ELASTIC_RESTARTS = 10


def shutdown_seconds() -> int:
    """Return how long ranks may take to save and end after a signal."""
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_TIMEOUT_S))


def run_ranks(
    nproc: int, arguments: Sequence[str], nodes: Nodes, job: str, watch: RankWatch, stop: StopRequest
) -> None:
    """Run ``python -m mlet_dist ARGUMENTS`` in ``nproc`` ranks on this node and wait for all of them.

    Args:
        nproc: the number of ranks on this node.
        arguments: the command line of each rank, after ``python -m mlet_dist``.
        nodes: the nodes of the job, whose number is fixed and which have met.
        job: the id of the job.
        watch: watches the ranks; it passes the signals of ``stop`` on to them.
        stop: the signals that have arrived.

    Raises:
        UserError: a rank found an input error.
        Interrupted: the ranks received a signal to stop, and saved a checkpoint if they could.
        RanksLost: a rank found that others do not respond.
        ChildProcessError: a rank failed otherwise; its traceback has been printed.
        KeyboardInterrupt: this process received a signal to stop; the exception holds its number.
    """
    rendezvous = FixedRendezvous(nodes, job)
    config = {
        "min_nodes": nodes.count,
        "max_nodes": nodes.count,
        "run_id": job,
        "rdzv_endpoint": nodes.endpoint,
        "rdzv_backend": rendezvous.backend,
        "local_addr": "localhost" if nodes.count == 1 else None,
        "max_restarts": 0,
        "signals_to_handle": "",  # `stop` has them, and raises nothing in the middle of this
    }
    _choose_interface(nodes)
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # `job` contains nproc: no need to ask the other nodes
    with _log_directory() as logs:
        try:
            with watch.watch(logs):
                _launch(config, nproc, logs, arguments)
        except ChildFailedError as failed:
            if stop.received:
                raise error_in_logs(logs) or KeyboardInterrupt(stop.received[0]) from None
            raise _error_of(failed, arguments, watch, logs) from None
    stop.check()


def run_elastic(nproc: int, arguments: Sequence[str], nodes: Nodes, job: str, *, on_cuda: bool) -> None:
    """Run the ranks of this node of a job whose nodes may leave and join; torch elastic restarts them.

    Args:
        nproc, arguments, nodes, job: as for ``run_ranks``.
        on_cuda: whether the ranks use NCCL.

    Raises:
        NodesMissing: too few nodes joined, at the start or after others were lost.
        ConnectionLost: node 0 is lost, or another node while the nodes met; or the job ended before this node joined.
        Exception: as ``run_ranks`` raises.
    """
    # A node that joins after the last call is admitted, too: the ranks of all nodes are then restarted.
    options = {
        "is_host": nodes.rank == 0,
        "read_timeout": min(int(nodes.wait), 60),
        "join_timeout": max(int(nodes.wait), 50),  # a dead node is noticed after 15 s, before the last call
        "last_call_timeout": min(int(nodes.wait), 15),
    }
    rounds = RendezvousRounds()
    config = {
        "min_nodes": nodes.min_count,
        "max_nodes": nodes.count,
        "run_id": job,
        "rdzv_endpoint": nodes.endpoint,
        "rdzv_backend": OpenRendezvous(rounds).backend,
        "rdzv_configs": options,
        "max_restarts": _ELASTIC_RESTARTS,
        "signals_to_handle": ",".join(number.name for number in FORWARDED),
    }
    _choose_interface(nodes)
    # torch elastic 2.13 publishes a shared store once: a node that joins later would wait for its address in vain.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    watch = RankWatch((), shutdown_seconds(), lambda kind, text: None, on_cuda=on_cuda)
    with _log_directory() as logs:
        end = partial(_end_without_node_0, nodes, logs)
        try:
            with (
                _raised_signals(),
                watch.watch(logs),
                ElasticBeats(nodes, job, rounds, options["last_call_timeout"], end),
            ):
                _launch(config, nproc, logs, arguments)
        except SignalException as stopped:
            raise error_in_logs(logs) or KeyboardInterrupt(stopped.sigval) from None
        except ChildFailedError as failed:
            raise _error_of(failed, arguments, watch, logs) from None
        except RendezvousTimeoutError:
            raise NodesMissing(
                f"fewer than {nodes.min_count} nodes joined at {nodes.endpoint} in time (--wait {nodes.wait:g}); "
                "check that all nodes run the same command and can reach node 0"
            ) from None
        except RendezvousClosedError:
            raise ConnectionLost(f"the job at {nodes.endpoint} ended before this node joined it") from None
        except (RendezvousError, DistError):
            raise _node_0_lost(nodes) from None


def _node_0_lost(nodes: Nodes) -> ConnectionLost:
    return ConnectionLost(
        f"node 0 at {nodes.endpoint} does not answer any more, or a node was lost while all of them met"
    )


def _end_without_node_0(nodes: Nodes, logs: Path) -> NoReturn:
    """End this process from another thread, while the main thread waits in C++ for node 0, maybe for ever."""
    with suppress(OSError):  # stderr may be closed
        print_error(_node_0_lost(nodes))
    shutil.rmtree(logs, ignore_errors=True)
    os._exit(ConnectionLost.EXIT_CODE)  # its ranks die with it


def _error_of(failed: ChildFailedError, arguments: Sequence[str], watch: RankWatch, logs: Path) -> Exception:
    return error_of_failure(
        failed,
        trains=list(arguments[:1]) == ["train"],
        killed=watch.killed,
        stopped=watch.stopped,
        on_cuda=watch.on_cuda,
        folders={pid: folder.path for pid, folder in folders_by_process(logs).items()},
    )


def _choose_interface(nodes: Nodes) -> None:
    if nodes.count == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if interface := gloo_interface(socket.gethostname(), nodes.master):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        text = f"{socket.gethostname()} has no address that other nodes reach; gloo uses the interface {interface}"
        log_of_node(nodes.rank, nodes.count, text)


def _launch(config: dict[str, Any], nproc: int, logs: Path, arguments: Sequence[str]) -> None:
    os.environ.update(thread_environment(nproc, os.environ))
    # As without torch elastic, which sets 1: then NCCL's watchdog first aborts communicators, which may hang.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    logging.disable(logging.ERROR)  # torch elastic would log its own report of a failure before our message
    complete = LaunchConfig(
        nproc_per_node=nproc,
        monitor_interval=0.1,
        shutdown_timeout=shutdown_seconds(),
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        **config,
    )
    elastic_launch(complete, sys.executable)("-m", "mlet_dist", *arguments)


@contextmanager
def _log_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlet-", ignore_cleanup_errors=True) as logs:
        yield Path(logs)


@contextmanager
def _raised_signals() -> Iterator[None]:
    """Raise torch elastic's exception on a signal within the block, also while its own rendezvous waits."""
    before = {number: signal.signal(number, _raise) for number in FORWARDED}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        if wakeup != -1:
            signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number)
    raise SignalException(f"process {os.getpid()} received {name.name}", sigval=name)
