"""`mlet widths`."""

import argparse
from pathlib import Path

from mlet_dist.atomic_file import replaced_file
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch
from mlet_dist.errors import UserError

TEXT = "Show which rows of a compressed run have how many columns, how rows moved, and what the tables take."
EPILOG = """\
The command reads the run directory alone. The run may still be training: then it shows the run up to its last record.

  mlet widths runs/half --out widths.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", metavar="RUN", help="directory that `mlet train` made, with compression")
    parser.add_argument("--out", metavar="WIDTHS.html", help="also write a page of plots, by table and over time")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.out is not None and Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: the widths are written as an HTML page; name a file that ends in .html")
    configure_torch()
    from mlet_dist.widths.run_widths import widths_of
    from mlet_dist.widths.widths_page import html_page
    from mlet_dist.widths.widths_report import text_report

    result = widths_of(Path(args.run))
    if args.out is not None:
        try:
            with replaced_file(Path(args.out)) as file:
                file.write(html_page(result).encode())
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    if not args.json:
        print_text(text_report(result))
        return None, True
    return result, True
