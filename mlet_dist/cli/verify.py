"""`mlet verify`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_data
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import before_torch

TEXT = "Compare factorised and collapsed predictions, row by row; exit code 1 if they differ."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("export", metavar="EXPORT", help="what `mlet export` made")
    parser.add_argument("--run", required=True, help="the run it was exported from")
    add_data(parser)
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest difference between two logits (default %(default)s)"
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    before_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.verify import verify_export

    result = verify_export(Path(args.export), Path(args.run), data_set_path(args.data), args.split, args.tolerance)
    return result, result["ok"]
