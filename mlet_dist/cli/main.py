"""The command line as a whole: all commands, and settings wherever they stand."""

import argparse
from typing import Protocol

from mlet_dist.cli import compare, doctor, evaluate, export, factorize, plan, prepare, spectrum, synth, train, verify
from mlet_dist.cli.nodes import check_options
from mlet_dist.cli.options import Parser
from mlet_dist.cli.output import Result
from mlet_dist.errors import UserError


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
