"""`mlet synth`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import positive
from mlet_dist.cli.output import Result

TEXT = "Make a synthetic data set with Criteo's columns, power-law ids and a label that can be learnt."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the data; it must be new or empty")
    parser.add_argument(
        "--rows", type=positive, required=True, metavar="N", help="number of rows of all splits together"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed; the same seed writes the same bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--num-embeddings",
        type=int,
        default=10_000,
        metavar="N",
        help="rows of the largest table (default: %(default)s)",
    )
    parser.add_argument(
        "--alpha", type=float, default=1.05, metavar="A", help="exponent of the ids' power law (default: %(default)s)"
    )
    parser.add_argument(
        "--multi-valued", nargs="+", type=_list_length, default=[], metavar="C3=5",
        help="features to make multi-valued, each with the mean number of ids of a row",
    )  # fmt: skip
    parser.add_argument(
        "--weighted", nargs="+", default=[], metavar="C3", help="multi-valued features whose ids get weights"
    )
    parser.add_argument(
        "--format", choices=["parquet", "tsv"], default="parquet",
        help="parquet: a data set to train on; tsv: raw Criteo logs for `mlet prepare` (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    from mlet_dist.data.synthetic import synthesize

    result = synthesize(
        Path(args.out),
        rows=args.rows,
        seed=args.seed,
        num_embeddings=args.num_embeddings,
        alpha=args.alpha,
        multi_valued=dict(args.multi_valued),
        weighted=args.weighted,
        format=args.format,
    )
    return result, True


def _list_length(text: str) -> tuple[str, float]:
    name, _, mean = text.partition("=")
    try:
        return name, float(mean)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a feature and its mean number of ids, such as C3=5"
        ) from None
