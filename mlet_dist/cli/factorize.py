"""`mlet factorize`."""

import argparse
import sys
from pathlib import Path

from mlet_dist.cli.options import positive
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import before_torch
from mlet_dist.errors import UserError

TEXT = "Existing tables -> factors W1·W2 of the same product, from which `mlet train` goes on."
EPILOG = """\
TABLES is an export or a single-layer run of ours, a directory of torch.distributed.checkpoint, a state dict that
torch.save wrote, or safetensors: a file, a directory of them or an index. Tables are the tensors called
…embedding_bags.<table>.weight or …embeddings.<table>.weight; where there are none, every tensor must be a table, called
<table>.weight or <table>. A table is named after its feature.

  mlet factorize tables.pt --hidden-dim 64 --out factors
  mlet train configs/criteo_kaggle.yaml train.initial_weights=factors model.hidden_dim=64 data.path=… run.dir=…

The factors are balanced, W1ᵀW1 = W2W2ᵀ, so W2 is as large as W1: for a table of many rows W2ᵀW2, by which SGD's
learning rate of the table is multiplied, may be far above the 1 of our own recipe (it is printed as mean_gain). Lower
the learning rate by as much, or choose --gain 1."""

_MOST_GAIN = 4.0  # kσ² of the paper's recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("tables", metavar="TABLES", help="where the tables are")
    parser.add_argument("--hidden-dim", type=positive, required=True, metavar="K", help="columns of W1; at least d")
    parser.add_argument("--out", required=True, help="directory for the factors; must not exist or be empty")
    parser.add_argument(
        "--table-pattern", metavar="REGEX", help="which tensors are tables, with a group (?P<table>…) for their names"
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="leave the dense layers of a DLRM out; they then begin at random"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the k - d further rows of W2 (default %(default)s)")
    parser.add_argument(
        "--gain", type=_gain, metavar="G", help="give W2ᵀW2 the mean G instead of balancing; the product is the same"
    )


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: it must be from 0 to 2^63 - 1")
    before_torch()
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
    if gain > _MOST_GAIN:
        print(
            f"mlet: warning: the mean of W2ᵀW2 is up to {gain:,.0f}, by which SGD's learning rate "
            "of these tables will be multiplied; lower it, or choose --gain 1",
            file=sys.stderr,
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
