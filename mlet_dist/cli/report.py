"""`mlet report`."""

import argparse
import math
from pathlib import Path

from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch

TEXT = "Show what each way of making tables smaller costs in quality, and what to choose, as a page with charts."
EPILOG = """\
The report is about the arms of sweeps and comparisons, and about single runs, each with one mean over its seeds. They
must have been trained on the same data. It compares every arm, in every output that was measured, with the tuned single
layer in float32. DIR gets report.html, which is one file, figures/*.png, report.json and report.md.

  mlet sweep configs/sweeps/criteo.yaml --out sweeps/criteo
  mlet report sweeps/criteo --out reports/criteo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="SWEEP_COMPARISON_OR_RUN",
        help="directories that `mlet sweep`, `mlet compare` or `mlet train` made",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory for the report")
    parser.add_argument(
        "--margin", type=_margin, default=0.001, metavar="X",
        help="the LogLoss by which an output may be above the single layer's and still count as equal (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        metavar="ARM",
        help="arm that all are compared with (default: the single layer with the least LogLoss on the split valid)",
    )
    parser.add_argument(
        "--label", metavar="NAME", help="of several labels, the one whose metrics count (default: the first)"
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    configure_torch()
    from mlet_dist.report.run_report import report

    result, text = report(args.directories, args.out, args.margin, args.reference, args.label)
    if args.json:
        return result, True
    print_text(f"{text}\n\nThe page: {args.out / 'report.html'}")
    return None, True


def _margin(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return found
