"""This process among others: its rank, the launcher that started it, and the environment that torch needs."""

import argparse
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from mlet_dist.errors import UserError
from mlet_dist.openmp import thread_environment

_LAUNCHED = "MLET_LAUNCHED"
_RESULT_LATER = "MLET_RESULT_LATER"
_COMMANDS_OF_RANKS = ("train", "evaluate", "predict", "export")
_PARENT = "MLET_PARENT"  # the process that this one must not outlive


def die_with_parent() -> None:
    """End this process when the `mlet` or torchrun that started it ends, even by SIGKILL."""
    parent = os.environ.pop(_PARENT, None)
    if sys.platform == "linux" and (parent is not None or "TORCHELASTIC_RUN_ID" in os.environ):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is None:
        return
    if os.getppid() != int(parent):  # the parent ended before the call of prctl
        sys.exit(1)
    if is_launched_rank():  # torch elastic ends its ranks by SIGTERM or SIGINT: end at once, without a message
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def rank_of(args: argparse.Namespace) -> int | None:
    """Return the rank of this process among those that run the command together; None if it runs alone.

    Only some commands run in ranks, whatever the environment says: Kubeflow sets RANK for every command.
    """
    runs_in_ranks = args.name in _COMMANDS_OF_RANKS or (args.name == "doctor" and args.distributed)
    if "RANK" not in os.environ or not runs_in_ranks or args.nproc is not None:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name)
        if value is None or not value.isdecimal():
            found = "is not set" if value is None else f"is {value!r}, not a number"
            raise UserError(
                f"the environment has RANK, but {name} {found}; start the ranks with --nproc or torchrun, or unset RANK"
            )
    return int(os.environ["RANK"])


def is_launched_rank() -> bool:
    """Return whether `mlet … --nproc` started this rank; the launcher then checks the config and prints errors."""
    return _LAUNCHED in os.environ


def is_reported_elsewhere(error: BaseException) -> bool:
    """Record the error for the launcher; return whether the launcher, or another rank of torchrun, prints it."""
    # TorchX also sets the file for whole nodes, without RANK, and would print the traceback besides our line.
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or "RANK" not in os.environ:
        return False
    from mlet_dist.cluster.rank_errors import record_failure, reported_by_another_rank

    record_failure(error)
    return is_launched_rank() or reported_by_another_rank(error)


def tell_launcher_of_success() -> None:
    """Tell the launcher that this rank has not been killed; without effect if no launcher started this process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None and is_launched_rank():
        from mlet_dist.training.attempts import ENDED

        with suppress(OSError):
            Path(file).with_name(ENDED).touch()


def configure_torch() -> None:
    """Set the environment variables and filters that must be set before torch is imported."""
    import logging
    import warnings

    threading.excepthook = _show_failure_of_thread
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    os.environ.update(thread_environment(int(local_ranks) if local_ranks.isdecimal() else 1, os.environ))
    # On each rank DDP would warn about an option that training/sharding.py sets on purpose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # These libraries log at start-up; their errors still show.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|torchrec|fbgemm_gpu|torchmetrics)\b")


def _show_failure_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Show the traceback, except of TensorBoard's writer, whose failure is raised again with the next record."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def make_children_die_with_parent() -> None:
    """Make the `mlet` processes that this one starts end when it ends."""
    os.environ[_PARENT] = str(os.getpid())


def mark_children_as_ranks() -> None:
    """Make ``is_launched_rank`` true in the `mlet` processes that this one starts."""
    os.environ[_LAUNCHED] = "1"


def leave_result_to_parent() -> None:
    """Make ``result_is_left_to_parent`` true in the ranks that this process starts: it prints their result itself."""
    os.environ[_RESULT_LATER] = "1"


def result_is_left_to_parent() -> bool:
    """Return whether the `mlet` that started this rank prints the result."""
    return is_launched_rank() and _RESULT_LATER in os.environ
