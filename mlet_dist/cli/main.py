"""The `mlet` command: parses the command line, runs one command, and turns errors and signals into exit codes."""

import argparse
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

from mlet_dist.cli import compare, doctor, evaluate, export, factorize, plan, prepare, spectrum, synth, train, verify
from mlet_dist.cli.options import Parser, check_options
from mlet_dist.cli.output import Result, print_error, show
from mlet_dist.cli.process import die_with_parent, handed_to_launcher, launched, rank_of
from mlet_dist.errors import ConnectionLost, Interrupted, RanksLost, UserError


@contextmanager
def answering_signals(args: argparse.Namespace, rank: int | None) -> Iterator[None]:
    """What SIGTERM does, and for `train` SIGUSR1, until training answers them itself."""
    from mlet_dist.training.signals import STOP_SIGNALS, exit_on_stop_signal

    if args.name == "train" and args.nproc is None and not launched():  # of such ranks, the launcher tells
        with exit_on_stop_signal():
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


class _Command(Protocol):
    """What a command's file holds; its name is the file's."""

    __name__: str
    TEXT: str

    @property
    def EPILOG(self) -> str | None: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, arguments: list[str], /) -> tuple[Result | None, bool]: ...


_COMMANDS: tuple[_Command, ...] = (
    prepare, synth, train, compare, plan, evaluate, export, verify, factorize, spectrum, doctor,
)  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """What the words of a command line mean.

    Raises:
        UserError: they mean nothing.
    """
    parser = _build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one place only; here they may also follow an option.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if "overrides" in args:
        args.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        raise UserError(f"unknown argument {rest[0]!r} (see `mlet {args.name} --help`)")
    check_options(args)
    return args


def _build_parser() -> Parser:
    from mlet_dist import __version__

    parser = Parser(
        prog="mlet", description="Train recommendation models with multi-layer embeddings, serve plain TorchRec tables."
    )
    parser.add_argument("--version", action="version", version=f"mlet-dist {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.TEXT,
            description=command.TEXT,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command.run)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line")
        command.add_arguments(sub)
    return parser


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
            from mlet_dist.training.signals import interrupted_unsaved

            print(f"mlet: {interrupted_unsaved(number)}", file=sys.stderr)
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
