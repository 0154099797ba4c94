"""`mlet predict`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_nproc, add_run_or_export, choice_of
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import configure_torch
from mlet_dist.cli.ranks import run_in_ranks

TEXT = "Write the scores of a run or an export for every row of a split, or of raw files."
EPILOG = """\
The Parquet file has a row for each row of the split, in its order: row (from 0), label, logit, probability, and weight
if the data set's rows have weights. Any number of ranks writes the same rows.

Raw files are of the format that the model's data set was made from, with or without labels. They are read with the
vocabularies, means and deviations of the model: of the run's data set, or those that an export carries.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_or_export(parser)
    parser.add_argument(
        "--data", required=True, metavar="DATA",
        help="directory of the data set, or its URL; or raw files: a path, URL, directory or pattern in quotes",
    )  # fmt: skip
    parser.add_argument("--split", choices=["train", "valid", "test"], help="split of the data set (default: test)")
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet file to write; it must be new")
    add_nproc(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.nproc is not None:
        return run_in_ranks(args, arguments, lambda: None)
    configure_torch()
    from mlet_dist.export.run_predict import predict_path

    return predict_path(Path(args.target), args.data, args.split, Path(args.out), choice=choice_of(args)), True
