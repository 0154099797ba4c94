"""`python -m mlet_dist` is the `mlet` command, whose signals are handled from here on, before anything is imported."""

import os
import signal
import sys
from typing import NoReturn

_TRY_AGAIN = 75  # errors.Interrupted.EXIT_CODE, which is not imported yet


def main() -> int:
    """Run the `mlet` command, and return its exit code."""
    early = set()
    if "MLET_LAUNCHED" in os.environ:  # the launcher reports what ends its ranks
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    elif sys.argv[1:2] == ["train"]:
        early = {signal.SIGTERM, signal.SIGUSR1}
    before = {number: signal.signal(number, _stop) for number in early}
    try:
        from mlet_dist.cli import main as run
    except KeyboardInterrupt:
        print("mlet: interrupted; nothing was written, run the command again", file=sys.stderr)
        return 130
    try:
        return run()
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # a run that has finished ignores it until the end
                signal.signal(number, handler)


def _stop(number: int, _: object) -> NoReturn:
    """End the process before anything was done, as training would end it later."""
    name = signal.Signals(number).name
    print(f"mlet: {name}: stopped before it began; run the same command again", file=sys.stderr, flush=True)
    os._exit(_TRY_AGAIN)


if __name__ == "__main__":
    sys.exit(main())
