"""`--nproc N`: the same command again in N local ranks, through torch elastic."""

import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlet_dist.errors import UserError


def run_ranks(nproc: int, arguments: Sequence[str]) -> None:
    """Run ``python -m mlet_dist ARGUMENTS`` in ``nproc`` ranks on this host and wait for all of them.

    Raises:
        UserError: the first rank to fail did so by a user's mistake.
        RuntimeError: it failed otherwise.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mlet_dist", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        # What `record_failure` wrote, or the launcher's own words where the rank died without a word.
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        kind, _, message = said.partition(": ")
        if kind == UserError.__name__:
            raise UserError(message) from None
        raise RuntimeError(f"rank {rank} failed (exit code {failure.exitcode}): {said}") from None


def record_failure(error: BaseException) -> None:
    """Write an error to the file from which torch elastic's agent of this rank takes it."""
    ErrorHandler().record_exception(error)
