"""`mlet evaluate`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_checkpoint_choice, add_data, add_nproc, choice_of
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import configure_torch
from mlet_dist.cli.ranks import run_in_ranks

TEXT = "Compute the AUC and LogLoss of a run or an export."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "target",
        metavar="RUN_OR_EXPORT",
        help="directory that `mlet train` or `mlet export` made, or of a checkpoint of a run",
    )
    add_checkpoint_choice(parser, "a run")
    add_data(parser)
    add_nproc(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.nproc is not None:
        return run_in_ranks(args, arguments, lambda: None)
    configure_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.run_evaluate import evaluate_path

    return evaluate_path(Path(args.target), data_set_path(args.data), args.split, choice=choice_of(args)), True
