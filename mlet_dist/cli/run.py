"""Runs one command of `mlet`, and turns what it raises into a line and an exit code."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

from mlet_dist.cli.main import parse
from mlet_dist.cli.output import print_error, show
from mlet_dist.cli.process import die_with_parent, handed_to_launcher, rank_of
from mlet_dist.cli.signals import answering_signals
from mlet_dist.errors import ConnectionLost, Interrupted, RanksLost, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    0 on success, 2 for a user's mistake, 75 for a run that is to be started again since it was told to stop or another
    node has gone, 130 and 143 when interrupted or terminated, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by `2>&-`; print would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        die_with_parent()
        args = parse(arguments)
        rank = rank_of(args)
        with answering_signals(args, rank):
            result, ok = args.command(args, arguments)
        if result is not None and not rank:
            show(result, args.json)
        return 0 if ok else 1
    except UserError as error:
        if not handed_to_launcher(error):
            print_error(error)
        return 2
    except Interrupted as stopped:
        if not handed_to_launcher(stopped):
            print(f"mlet: {stopped}", file=sys.stderr)
        return Interrupted.EXIT_CODE
    except RanksLost as error:
        if not handed_to_launcher(error):
            print_error(error)
        return ConnectionLost.EXIT_CODE if isinstance(error, ConnectionLost) else 1
    except ChildProcessError as error:  # which has shown its own traceback, if it could
        print_error(error)
        return 1
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if arguments[:1] == ["train"] and number != signal.SIGINT:
            from mlet_dist.training.signals import not_saved

            print(f"mlet: {not_saved(number)}", file=sys.stderr)
            return Interrupted.EXIT_CODE
        print("mlet: interrupted" if number == signal.SIGINT else "mlet: terminated", file=sys.stderr)
        return 128 + int(number)
    except Exception as error:
        if not handed_to_launcher(error):
            traceback.print_exc()
            if "RANK" in os.environ:
                where = f"rank {os.environ['RANK']} on {socket.gethostname()}"
                print_error(f"{where} failed: {type(error).__name__}: {error}")
        return 1
