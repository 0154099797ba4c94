"""What signals do to a command."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mlet_dist.cli.process import launched


@contextmanager
def answering_signals(args: argparse.Namespace, rank: int | None) -> Iterator[None]:
    """What SIGTERM does, and for `train` SIGUSR1, until training answers them itself."""
    from mlet_dist.training.signals import STOP_SIGNALS, exiting_when_told

    if args.name == "train" and args.nproc is None and not launched():  # of such ranks, the launcher tells
        with exiting_when_told():
            yield
        return
    numbers = STOP_SIGNALS if args.name == "train" else (signal.SIGTERM,)
    before = {number: signal.signal(number, _unwind) for number in numbers if rank is None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, _: object) -> NoReturn:
    """Let a signal do what Ctrl-C does, so that temporary directories are removed."""
    raise KeyboardInterrupt(number)
