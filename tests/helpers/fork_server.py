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
    context.set_forkserver_preload(
        [
            *("mlet_dist.cli.main", "mlet_dist.training.trainer", "mlet_dist.export.verify.run_verify"),
            *("mlet_dist.data.prepare.pipeline", "mlet_dist.data.synthetic", "torch.distributed.run"),
            # What TorchRec and torch.export import when they are first used.
            *("torch.distributed.optim.apply_optimizer_in_backward", "torch.export.pt2_archive._package"),
            "tests.helpers.frozen_objects",
        ]
    )
    # What is read when torch is imported, with the values that ranks have.
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    settings["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more of them are processes that import torch again
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
