"""`mlet spectrum`."""

import argparse
from pathlib import Path

from mlet_dist.cli.output import Result, write
from mlet_dist.cli.process import before_torch

TEXT = "Singular values of the tables of a run, an export or factors: how many of their columns they use."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("source", metavar="RUN_OR_EXPORT", help="what `mlet train`, `export` or `factorize` made")
    parser.add_argument(
        "--data", metavar="DATA", help="data set whose training split weights the rows (default: the run's, if there)"
    )
    parser.add_argument("--out", metavar="DIR", help="also write spectrum.json and a page of plots, spectrum.html")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    before_torch()
    from mlet_dist.export.spectrum.run_spectrum import spectrum_of
    from mlet_dist.export.spectrum.spectrum_report import report

    result = spectrum_of(Path(args.source), args.data, None if args.out is None else Path(args.out))
    if not args.json:
        write(report(result))
        return None, True
    return result, True
