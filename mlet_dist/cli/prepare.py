"""`mlet prepare`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import byte_size, positive
from mlet_dist.cli.output import Result
from mlet_dist.errors import UserError

TEXT = "Raw data -> Parquet parts, vocabularies, a schema and a manifest."
EPILOG = """\
  mlet prepare criteo train.txt --out data/criteo                  # Criteo-Kaggle
  mlet prepare criteo day_{0..23}.gz --split paper --out data/1tb  # Criteo-1TB
  mlet prepare avazu train.gz --out data/avazu
  mlet prepare table ratings.csv --schema configs/tables/movielens.yaml --out data/movielens
  mlet prepare --check data/criteo

The same command goes on from what an interrupted one has finished, which is kept in .NAME.prepare beside DIR. With
other arguments it takes what these do not change: another --max-malformed, --min-count or --split reads nothing again.
Several machines that share a file system do one pass after the other, with the same arguments everywhere:

  mlet prepare criteo day_*.gz --out data/1tb --pass read --shard I/N     # on machine I of N
  mlet prepare criteo day_*.gz --out data/1tb --pass count --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass vocabulary           # on one
  mlet prepare criteo day_*.gz --out data/1tb --pass write --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass merge                # on one

--memory bounds what the processes hold beside the vocabularies; it does not depend on the number of rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("format", nargs="?", choices=["criteo", "avazu", "table"], help="format of the raw files")
    parser.add_argument("raw", nargs="*", metavar="RAW", help="raw files in time order: plain or .gz, paths or URLs")
    parser.add_argument("--out", metavar="DIR", help="directory for the data set; must not exist or be empty")
    parser.add_argument("--schema", metavar="FILE", help="of table: a YAML file that describes the columns")
    parser.add_argument("--min-count", type=int, help="rarer values share the out-of-vocabulary row (default 2)")
    parser.add_argument(
        "--split", choices=["rows", "paper", "random"],
        help="rows: 80%% / 10%% / 10%% in order (default of criteo); random: the same at random (default of avazu); "
        "paper: of criteo days 1-6 (or all files but the last) train, the rest halved into test and valid; of avazu "
        "random",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the random split (default 0)")
    parser.add_argument(
        "--max-malformed", type=float, metavar="SHARE",
        help="of a file's lines; more is an error at its end, and before it once they are more than SHARE of what is "
        "read and of 10 million lines. Ten may be malformed whatever SHARE is, 0 too, unless all are (default 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--memory",
        type=byte_size,
        metavar="SIZE",
        help="of all processes, such as 16G (default: half of the machine's)",
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="at most N (default: all cores)")
    parser.add_argument(
        "--pass", dest="only", choices=["read", "count", "vocabulary", "write", "merge"], help="do this pass alone"
    )
    parser.add_argument("--shard", metavar="I/N", help="do share I of N of the pass; I is from 0 to N-1")
    parser.add_argument("--check", metavar="DIR", help="verify a prepared data set instead of making one")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    if args.check is not None:
        if args.format is not None or args.out is not None:
            raise UserError("--check stands alone; it takes the directory of a data set")
        from mlet_dist.data.prepare.dataset_check import check

        schema = check(Path(args.check))
        return {"checked": args.check, "rows": schema.rows, "positive_rate": schema.positive_rate, "ok": True}, True
    from mlet_dist.data.prepare.pipeline import prepare_from

    prepared = prepare_from(args)
    if prepared is None:
        return {"out": args.out, "pass": args.only, "shard": args.shard or "0/1"}, True
    sizes = prepared.num_embeddings
    return {
        "out": args.out,
        "rows": prepared.rows,
        "positive_rate": prepared.positive_rate,
        "malformed": prepared.malformed,
        "tables": len(sizes),
        "num_embeddings": sum(sizes.values()),
    }, True
