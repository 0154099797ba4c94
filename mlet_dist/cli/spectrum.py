"""`mlet spectrum`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_checkpoint_choice, choice_of
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch

TEXT = "Compute the singular values of tables, which show how many of their columns they use."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_EXPORT",
        help="directory that `mlet train`, `mlet export` or `mlet factorize` made, or of a checkpoint of a run",
    )
    add_checkpoint_choice(parser, "a run")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="data set whose training split weights the rows, by the counts of their ids (default: the data set of "
        "the run, if it still exists)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="also write spectrum.json and a page of plots, spectrum.html, to this directory"
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    configure_torch()
    from mlet_dist.export.spectrum.run_spectrum import spectrum_of
    from mlet_dist.export.spectrum.spectrum_report import report

    out = None if args.out is None else Path(args.out)
    result = spectrum_of(Path(args.source), args.data, out, choice_of(args))
    if not args.json:
        print_text(report(result))
        return None, True
    return result, True
