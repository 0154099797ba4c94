"""`mlet describe`."""

import argparse
import io
import sys

from mlet_dist.cli.output import Result, print_text

TEXT = "Write a description of a raw file for `mlet prepare table`, guessed from its first rows, to be corrected."
EPILOG = """\
Examples:

  mlet describe clicks.csv.gz > table.yaml
  mlet describe 's3://bucket/logs/day=*/' > table.yaml
  mlet prepare table clicks.csv.gz --schema table.yaml --out data/clicks

The command reads at most 10,000 rows of the first file. It finds the format, the label, dense and sparse features,
lists and a time to split by, and says in comments what it saw and what it left out. All of it is a guess: check the
label first, then which whole numbers are quantities and which are categories. configs/tables/movielens.yaml explains
all keys."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "raw",
        metavar="RAW",
        help="raw file, directory or pattern, as a path or URL: delimited text, JSON lines or Parquet",
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    from mlet_dist.data.describe import describe

    found = describe(args.raw)
    if args.json:
        names = ("rows", "label", "dense", "sparse")
        return {"raw": args.raw, **{name: getattr(found, name) for name in names}, "description": found.text}, True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # which `mlet prepare` reads, whatever the locale
    print_text(found.text.removesuffix("\n"))
    if found.label is None:
        print("mlet: no column of labels was found; set `label` in the description", file=sys.stderr)
    return None, True
