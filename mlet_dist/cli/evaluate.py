"""`mlet evaluate`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_data, add_nproc, add_run_or_export, choice_of
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import configure_torch
from mlet_dist.cli.ranks import run_in_ranks

TEXT = "Compute the AUC and LogLoss of a run or an export."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_or_export(parser)
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
