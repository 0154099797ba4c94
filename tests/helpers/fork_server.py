"""A process that has imported torch, TorchRec and mlet_dist, from which tests fork others; imports take seconds."""

import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


@cache
def fork_server() -> ForkServerContext:
    """Start a process that has imported what ranks need, from which they are forked; imports take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlet_dist.training.trainer", "mlet_dist.export.verify.run_verify"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP reads it when torch is imported
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context
