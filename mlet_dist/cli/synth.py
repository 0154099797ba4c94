"""`mlet synth`."""

import argparse
from pathlib import Path

from mlet_dist.cli.output import Result

TEXT = "Criteo-shaped logs with power-law ids and a learnable label."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--out", required=True, help="directory to write; must not exist or be empty")
    parser.add_argument("--rows", type=int, required=True, help="number of rows")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default %(default)s)")
    parser.add_argument(
        "--num-embeddings", type=int, default=10_000, help="rows of the largest table (default %(default)s)"
    )
    parser.add_argument("--alpha", type=float, default=1.05, help="exponent of the power law (default %(default)s)")
    parser.add_argument(
        "--multi-valued", nargs="+", type=_list_length, default=[], metavar="C3=5",
        help="features that hold lists of ids, each with the mean length of its lists",
    )  # fmt: skip
    parser.add_argument("--weighted", nargs="+", default=[], metavar="C3", help="those of them whose ids have weights")
    parser.add_argument(
        "--format", choices=["parquet", "tsv"], default="parquet",
        help="parquet: a data set to train on; tsv: raw Criteo logs for `mlet prepare` (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
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
            f"{text!r} is not a feature and the mean length of its lists, as in C3=5"
        ) from None
