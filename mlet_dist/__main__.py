"""`python -m mlet_dist` is the `mlet` command, whose signals are handled from here on, before anything is imported."""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

_TRY_AGAIN = 75  # errors.Interrupted.EXIT_CODE, which is not imported yet
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # training.signals.STOP_SIGNALS


def main() -> int:
    """Run the `mlet` command, and return its exit code."""
    if "MLET_LAUNCHED" in os.environ:  # the launcher reports what ends its ranks
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        early: tuple[signal.Signals, ...] = ()
    else:
        early = _STOP_SIGNALS
    before = {number: signal.signal(number, _stop) for number in early}
    # `env --block-signal=TERM mlet …` keeps for us what arrives before Python runs: the first process of a container
    # would lose it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    try:
        from mlet_dist.cli import main as run
    except KeyboardInterrupt:
        print("mlet: interrupted; nothing was written, run the command again", file=sys.stderr)
        return 130
    try:
        code = run()
        for number in early:  # nothing is left to be stopped
            signal.signal(number, signal.SIG_IGN)
        return code
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def _stop(number: int, _: object) -> NoReturn:
    """End the process at once: nothing has been done yet, or the result has been printed."""
    trains = sys.argv[1:2] == ["train"]
    line = f"mlet: {signal.Signals(number).name}: stopped; run the same command again\n"
    with suppress(OSError):
        os.write(2, line.encode())  # print would fail within another print
    os._exit(_TRY_AGAIN if trains else 128 + number)


if __name__ == "__main__":
    sys.exit(main())
