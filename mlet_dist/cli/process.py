"""This process among others: ranks, the launcher that started it, and settings that must stand before torch."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError

_LAUNCHED = "MLET_LAUNCHED"
_TOGETHER = ("train", "evaluate", "export")
_PARENT = "MLET_PARENT"  # the process that this one must not outlive


def rank_of(args: argparse.Namespace) -> int | None:
    """The number of this process among those that run the command together; None where it runs alone.

    Only these commands run together: Kubeflow sets RANK for every command.
    """
    together = args.name in _TOGETHER or (args.name == "doctor" and args.distributed)
    if "RANK" not in os.environ or not together or args.nproc is not None:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name)
        if value is None or not value.isdecimal():
            found = "is not set" if value is None else f"is {value!r}, not a number"
            raise UserError(
                f"the environment has RANK, but {name} {found}; start the ranks by --nproc or torchrun, or unset RANK"
            )
    return int(os.environ["RANK"])


def die_with_parent() -> None:
    """In a process that another `mlet` or torchrun started: end when that one ends, be it by kill -9."""
    parent = os.environ.pop(_PARENT, None)
    if sys.platform == "linux" and (parent is not None or "TORCHELASTIC_RUN_ID" in os.environ):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is None:
        return
    if os.getppid() != int(parent):  # gone before that
        sys.exit(1)
    if launched():  # torch elastic ends its ranks by SIGTERM or SIGINT: at once, and without a word
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def launched() -> bool:
    """Whether `--nproc` of another `mlet` started this rank: that one has checked the config and shows errors."""
    return _LAUNCHED in os.environ


def handed_to_launcher(error: BaseException) -> bool:
    """Whether this rank's launcher, or under torchrun another rank, shows the error; torchrun's report has it, too."""
    # TorchX sets the file for whole nodes, too, and would show the traceback beside our line.
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or "RANK" not in os.environ:
        return False
    from mlet_dist.cluster.launcher import record_failure, reported_by_another_rank

    record_failure(error)
    return launched() or reported_by_another_rank(error)


def before_torch() -> None:
    """Settings that must stand before torch is imported."""
    import logging
    import warnings

    # OpenMP's threads spin while they wait. Where other processes want the cores too, training took 10 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # DDP would warn on each rank of what training/sharding.py asks of it on purpose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The libraries' start-up chatter; errors still show.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|torchrec|fbgemm_gpu|torchmetrics)\b")


def tie_children() -> None:
    """Let `mlet` processes that this one starts end when it ends."""
    os.environ[_PARENT] = str(os.getpid())


def in_ranks(args: argparse.Namespace, arguments: list[str], check: Callable[[], Config | None]) -> tuple[None, bool]:
    """Run the same command line as `args.nproc` local ranks, on this node or on each of several.

    Args:
        check: what the command will run with; raises what is wrong with it on this node.
    """
    from mlet_dist.cli.options import nodes_of, without_launch

    rest = without_launch(arguments)
    nodes, job = nodes_of(args, rest)
    if nodes is None or nodes.is_elastic:
        config = check()  # before torch is imported
        check = lambda: config  # noqa: E731
    os.environ[_LAUNCHED] = "1"
    tie_children()
    before_torch()
    from mlet_dist.cluster.launcher import launch

    launch(args.nproc, rest, nodes, job, check)
    return None, True
