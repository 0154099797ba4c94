"""`mlet predict`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_data, add_nproc, add_run_or_export, choice_of
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import configure_torch
from mlet_dist.cli.ranks import run_in_ranks

TEXT = "Write the scores of a run or an export for every row of a split."
EPILOG = """\
The Parquet file has a row for each row of the split, in its order: row (from 0), label, logit, probability, and weight
if the data set's rows have weights. Any number of ranks writes the same rows.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_or_export(parser)
    add_data(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet file to write; it must be new")
    add_nproc(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.nproc is not None:
        return run_in_ranks(args, arguments, lambda: None)
    configure_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.run_predict import predict_path

    data, out = data_set_path(args.data), Path(args.out)
    return predict_path(Path(args.target), data, args.split, out, choice=choice_of(args)), True
