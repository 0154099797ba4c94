"""`mlet export`."""

import argparse
from pathlib import Path

from mlet_dist.cli.output import Result
from mlet_dist.cli.process import before_torch

TEXT = "Collapse W1·W2 of a finished run into plain TorchRec tables."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("run", metavar="RUN", help="what `mlet train` made")
    parser.add_argument("--out", required=True, help="directory for the export; must not exist or be empty")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    before_torch()
    from mlet_dist.export.collapse import export_run

    return export_run(Path(args.run), Path(args.out)), True
