"""`mlet factorize`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import positive
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import configure_torch
from mlet_dist.errors import UserError, print_warning

TEXT = "Factorise existing tables into W1·W2, the initial weights of a run of `mlet train`."
EPILOG = """\
TABLES is an export of `mlet export`, a run of `mlet train` with single-layer tables, a directory of
torch.distributed.checkpoint, a state dict of torch.save, or safetensors (a file, a directory of files, or an index).
Tables are the tensors named …embedding_bags.<table>.weight or …embeddings.<table>.weight. If there are none, every
tensor must be a table, named <table>.weight or <table>. A table must have the name of its feature.

  mlet factorize tables.pt --hidden-dim 64 --out factors
  mlet train configs/criteo_kaggle.yaml train.initial_weights=factors model.hidden_dim=64 data.path=… run.dir=…

The factors are balanced: W1ᵀW1 = W2W2ᵀ. Under SGD, W2ᵀW2 multiplies the effective learning rate of the table. Its mean
is 1 at the default initial values of `mlet train`, and can be far above 1 for factors of a table of many rows (the
command prints it as mean_gain). Divide the learning rate by it, or use --gain 1."""

_WARN_ABOVE_GAIN = 4.0  # kσ² of the paper's recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("tables", metavar="TABLES", help="path of the tables (see below)")
    parser.add_argument(
        "--hidden-dim",
        type=positive,
        required=True,
        metavar="K",
        help="k: number of columns of W1; at least d, the columns of the tables",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory for the factors; it must be new or empty"
    )
    parser.add_argument(
        "--table-pattern",
        metavar="REGEX",
        help="regular expression of the names of the tensors that are tables, with a group (?P<table>…) for the "
        "table's name",
    )
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="leave out the dense layers of a DLRM, which then start from random values",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the random values in the k - d rows of W2 that the product does not need (default: %(default)s)",
    )
    parser.add_argument(
        "--gain",
        type=_gain,
        metavar="G",
        help="scale W2 so that the mean of W2ᵀW2 is G, instead of balancing; the product W1·W2 stays the same",
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: it must be from 0 to 2^63 - 1")
    configure_torch()
    from mlet_dist.export.factorize.run_factorize import factorize_tables

    result = factorize_tables(
        Path(args.tables),
        args.hidden_dim,
        Path(args.out),
        seed=args.seed,
        gain=args.gain,
        table_pattern=args.table_pattern,
        tables_only=args.tables_only,
    )
    gain = result["mean_gain"]["max"]
    if gain > _WARN_ABOVE_GAIN:
        print_warning(
            f"the mean of W2ᵀW2 is up to {gain:,.0f}, which multiplies SGD's learning rate of these tables; divide the "
            "learning rate by it, or use --gain 1"
        )
    return result, True


def _gain(text: str) -> float:
    try:
        gain = float(text)
    except ValueError:
        gain = 0.0
    if not 0 < gain < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return gain
