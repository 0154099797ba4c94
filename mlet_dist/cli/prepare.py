"""`mlet prepare`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import byte_size, positive
from mlet_dist.cli.output import Result, print_text
from mlet_dist.errors import UserError, print_warning
from mlet_dist.urls import is_url, no_such_directory

TEXT = "Turn raw logs into a data set: Parquet files, vocabularies, a schema and a manifest."
EPILOG = """\
Examples:

  mlet prepare criteo train.txt --out data/criteo                  # Criteo-Kaggle
  mlet prepare criteo day_{0..23}.gz --split paper --out data/1tb  # Criteo-1TB
  mlet prepare avazu train.gz --out data/avazu
  mlet prepare table ratings.csv --schema configs/tables/movielens.yaml --out data/movielens
  mlet prepare table 's3://logs/day=*' --schema clicks.yaml --out data/clicks
  mlet prepare table --train train.csv --valid valid.csv --test test.csv --schema clicks.yaml --out data/clicks
  mlet prepare criteo --train day_24.gz --like data/1tb --grow --out data/day24
  mlet prepare --check data/criteo

The same command again resumes an interrupted one, whose finished work is kept in .NAME.prepare beside DIR. With other
arguments it reuses the work that they do not change: another --max-malformed, --min-count or --split does not read the
raw files again. Several machines with a shared file system run the passes one after the other, each pass with the same
arguments on all machines:

  mlet prepare criteo day_*.gz --out data/1tb --pass read --shard I/N     # on each machine I of N
  mlet prepare criteo day_*.gz --out data/1tb --pass count --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass vocabulary           # on one machine
  mlet prepare criteo day_*.gz --out data/1tb --pass write --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass merge                # on one machine

--memory limits the memory of all processes, except for the vocabularies. It need not grow with the number of rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("format", nargs="?", choices=["criteo", "avazu", "table"], help="format of the raw files")
    parser.add_argument(
        "raw", nargs="*", metavar="RAW",
        help="raw files in the order of time, as paths or URLs; a directory stands for all files below it, and *, ?, "
        "[] and ** are expanded. Text may be compressed (gzip, bzip2, xz, zstd, lz4, zip)",
    )  # fmt: skip
    for split in ("train", "valid", "test"):
        parser.add_argument(
            f"--{split}", nargs="+", action="extend", metavar="RAW",
            help=f"raw files of the {split} split, for data that is split already; in place of a rule for the rows",
        )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="directory or URL for the data set; it must be new or empty")
    parser.add_argument("--schema", metavar="FILE", help="for the format table: YAML file that describes the columns")
    parser.add_argument(
        "--like", metavar="DATA",
        help="take the vocabularies, table sizes, means, deviations and all other rules of this data set (a directory "
        "or URL), so that ids and numbers mean the same; without --schema also its description of the columns. "
        "--train, --valid or --test alone then puts all rows into one split",
    )  # fmt: skip
    parser.add_argument(
        "--grow", action="store_true",
        help="with --like: values that its vocabularies lack, and that occur often enough in the training split here, "
        "get new ids behind those that exist",
    )  # fmt: skip
    parser.add_argument(
        "--min-count", type=int, metavar="N",
        help="values that occur fewer than N times in the training split share id 0, out of vocabulary (default: 2; "
        "with --grow, of new values: as in the data set of --like)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=["rows", "paper", "random"],
        help="how rows are split into train, valid and test. rows: 80%% / 10%% / 10%% in order (default for criteo); "
        "random: the same shares at random (default for avazu); paper: for criteo, days 1-6 of one file, or all files "
        "except the last, are train, and the rest is halved into test and valid; for avazu, the same as random",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the random split (default: 0)")
    parser.add_argument(
        "--max-malformed", type=float, metavar="SHARE",
        help="largest share of malformed lines that a file may have, from 0 to 1; more are an error (default: 0.1). "
        "Up to ten malformed lines are always allowed, unless all lines are malformed. A file with far too many ends "
        "the command before it is read to its end",
    )  # fmt: skip
    parser.add_argument(
        "--memory",
        type=byte_size,
        metavar="SIZE",
        help="memory of all processes together, such as 16G (default: half of the machine's memory)",
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="largest number of processes (default: one for each core)"
    )
    parser.add_argument(
        "--pass", dest="only", choices=["read", "count", "vocabulary", "write", "merge"], help="run this pass only"
    )
    parser.add_argument("--shard", metavar="I/N", help="process part I of N of the pass; I is from 0 to N-1")
    parser.add_argument("--check", metavar="DIR", help="check a prepared data set, instead of making one")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.check is not None:
        if args.format is not None or args.out is not None:
            raise UserError(
                "--check cannot be combined with a format or --out; it takes only the directory of a data set"
            )
        from mlet_dist.data.prepare.dataset_check import check

        if is_url(args.check):
            raise UserError(f"{args.check}: {no_such_directory(Path(args.check))}")
        schema = check(Path(args.check))
        return {"checked": args.check, "rows": schema.rows, "positive_rate": schema.positive_rate, "ok": True}, True
    from mlet_dist.data.prepare.prepare_arguments import prepare_from

    prepared = prepare_from(args)
    if prepared is None:
        return {"out": args.out, "pass": args.only, "shard": args.shard or "0/1"}, True
    from mlet_dist.data.id_counts import (
        counts_table,
        out_of_vocabulary_shares,
        out_of_vocabulary_warnings,
    )
    from mlet_dist.data.label_classes import check_classes
    from mlet_dist.data.location import data_set_path
    from mlet_dist.data.schema import DatasetSchema

    out, held_out = Path(args.out), ("valid", "test")
    warnings = check_classes(out, prepared, held_out)
    for warning in warnings + out_of_vocabulary_warnings(out, prepared.id_counts, held_out):
        print_warning(warning)
    if not args.json:
        print_text("\n".join([*counts_table(prepared.id_counts), ""]))
    sizes = prepared.table_sizes
    result: Result = {
        "out": args.out,
        "rows": prepared.rows,
        "positive_rate": prepared.positive_rate,
        "malformed": prepared.malformed,
        "tables": len(sizes),
        "num_embeddings": sum(sizes.values()),
    }
    if args.grow:
        before = DatasetSchema.load(data_set_path(args.like)).table_sizes
        result["new_ids"] = sum(size - before[name] for name, size in sizes.items())
    if args.json:
        shares = {split: out_of_vocabulary_shares(prepared.id_counts, split) for split in prepared.id_counts}
        result["out_of_vocabulary"] = shares
    return result, True
