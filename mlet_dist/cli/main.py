"""The `mlet` command: parses the command line, runs one command, and turns errors and signals into exit codes."""

import argparse
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from mlet_dist.cli import (
    compare,
    describe,
    doctor,
    evaluate,
    export,
    factorize,
    plan,
    predict,
    prepare,
    report,
    spectrum,
    sweep,
    synth,
    train,
    verify,
    widths,
)
from mlet_dist.cli.options import Parser, check_options
from mlet_dist.cli.output import Result, print_result
from mlet_dist.cli.process import (
    die_with_parent,
    is_launched_rank,
    is_reported_elsewhere,
    rank_of,
    tell_launcher_of_success,
)
from mlet_dist.errors import Interrupted, RanksLost, UserError, print_error, refusal
from mlet_dist.json_log import log_as_asked
from mlet_dist.training.rank_files import record_process


class _Command(Protocol):
    """The module of a command, whose name is the command's."""

    __name__: str
    TEXT: str

    @property
    def EPILOG(self) -> str | None: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, arguments: list[str], /) -> tuple[Result | None, bool]: ...


_COMMANDS: tuple[_Command, ...] = (
    describe, prepare, synth, train, compare, sweep, report, plan, evaluate, predict, export, verify, factorize,
    spectrum, widths, doctor,
)  # fmt: skip


_SETTING = re.compile(r"\w+\.[^/=]+=")
_AFTER_A_STOP = {
    "train": "run the same command again to resume from the last checkpoint, or to start",
    "compare": "run the same command again; it keeps the models that are trained",
    "sweep": "run the same command again; it keeps the runs that are finished, and resumes the others",
    "prepare": "run the same command again; it keeps the finished work",
    "export": "run the same command again; it keeps the finished work",
}
_NOTHING_WRITTEN = "nothing was written, run the command again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit code is 0 on success; 2 for an input error (a wrong argument, config or file); 69 if not all nodes joined
    in time; 75 for a run that should be started again, because a signal stopped it or another node was lost; 130 and
    143 when a command was interrupted or terminated; and 1 for all else.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by `2>&-`; print would use stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        with log_as_asked():
            return _run(arguments)
    except UserError as error:  # of the format of the log
        print_error(error)
        return 2


def _run(arguments: list[str]) -> int:
    try:
        die_with_parent()
        if is_launched_rank():
            record_process()
        args = parse(arguments)
        rank = rank_of(args)
        with handle_signals(args, rank):
            result, ok = args.command(args, arguments)
        if result is not None and not rank:
            print_result(result, args.json)
        tell_launcher_of_success()
        return 0 if ok else 1
    except UserError as error:
        if not is_reported_elsewhere(error):
            print_error(error)
        return 2
    except Interrupted as stopped:
        if not is_reported_elsewhere(stopped):
            print(f"mlet: {stopped}", file=sys.stderr)
        return Interrupted.EXIT_CODE
    except RanksLost as error:
        if not is_reported_elsewhere(error):
            print_error(error)
        return error.EXIT_CODE
    except ChildProcessError as error:  # the child process has printed its traceback, if it could
        print_error(error)
        return 1
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if arguments[:1] == ["train"] and number != signal.SIGINT:
            from mlet_dist.training.signals import interrupted_unsaved

            print(f"mlet: {interrupted_unsaved(number)}", file=sys.stderr)
            return Interrupted.EXIT_CODE
        how = "interrupted" if number == signal.SIGINT else "terminated"
        print(f"mlet: {how}; {_AFTER_A_STOP.get(''.join(arguments[:1]), _NOTHING_WRITTEN)}", file=sys.stderr)
        return 128 + int(number)
    except Exception as error:
        refused = refusal(error)
        if refused is not None:
            if not is_reported_elsewhere(refused):
                print_error(refused)
            return 2
        if not is_reported_elsewhere(error):
            traceback.print_exc()
            if "RANK" in os.environ:
                where = f"rank {os.environ['RANK']} on {socket.gethostname()}"
                print_error(f"{where} failed: {type(error).__name__}: {error}")
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: an argument is unknown, missing or wrong.
    """
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"argument {number}, {argument!r}, is not UTF-8 text, which results and configs are; rename the file "
                "or directory"
            ) from None
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse accepts overrides in one place only; here they may also follow an option.
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if "overrides" in args:
        args.overrides += overrides
        rest = [argument for argument in rest if argument not in overrides]
    if rest:
        raise UserError(f"unknown argument {rest[0]!r} (see `mlet {args.name} --help`)")
    check_options(args)
    config = getattr(args, "config", None) if "overrides" in args else None  # `mlet doctor` needs none
    if config is not None and not os.path.lexists(config) and _SETTING.match(config):
        raise UserError(
            f"no CONFIG is given: {config!r} is a setting; name a YAML file before the settings, for example "
            f"configs/criteo_kaggle.yaml (see `mlet {args.name} --help`)"
        )
    return args


def build_parser() -> Parser:
    """Return the parser of the command line, with a subparser for each command."""
    from mlet_dist import __version__

    parser = Parser(
        prog="mlet",
        description="Train recommendation models with multi-layer embeddings (MLET), and serve plain TorchRec tables.",
        epilog="`mlet COMMAND --help` explains a command and its options. Exit codes: 0 success; 2 input error; 69 not "
        "all nodes of a job joined in time; 75 start the same command again, because a signal stopped the run or "
        "another node was lost; 130 and 143 interrupted and terminated; 1 anything else.",
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
        sub.add_argument(
            "--json", action="store_true", help="print the result as one JSON object, in the last line of stdout"
        )
        command.add_arguments(sub)
    return parser


@contextmanager
def handle_signals(args: argparse.Namespace, rank: int | None) -> Iterator[None]:
    """Handle SIGTERM and SIGUSR1 until training or a launcher handles them itself."""
    if args.name == "train" and not is_launched_rank():
        from mlet_dist.training.signals import exit_on_stop_signal

        with exit_on_stop_signal():
            yield
    elif rank is None:
        from mlet_dist.cli.interrupts import InterruptOnStopSignal

        with InterruptOnStopSignal():
            yield
    else:  # the launcher or torchrun reports what ends its ranks
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        yield
