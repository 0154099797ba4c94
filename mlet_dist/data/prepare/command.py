"""What the arguments of `mlet prepare` ask for."""

import argparse
from dataclasses import replace
from pathlib import Path

from mlet_dist.data.prepare.formats import avazu, criteo
from mlet_dist.data.prepare.passes import Shard
from mlet_dist.data.prepare.pipeline import Resources, prepare
from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.data.prepare.splits import PAPER_AVAZU, PAPER_CRITEO_FILES, PAPER_CRITEO_ROWS, SplitRule
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError

MIN_COUNT = 2


def prepare_from(args: argparse.Namespace) -> DatasetSchema | None:
    """Run ``prepare`` as the command line says."""
    if args.format is None:
        raise UserError("the format is missing; it is criteo, avazu or table (see `mlet prepare --help`)")
    if not args.raw:
        raise UserError("no raw file was given; name at least one (see `mlet prepare --help`)")
    if args.out is None:
        raise UserError("--out is missing; name the directory for the data set (see `mlet prepare --help`)")
    return prepare(
        _spec(args),
        args.raw,
        Path(args.out),
        resources=Resources(args.memory, args.processes),
        only=args.only,
        shard=None if args.shard is None else _shard(args.shard),
    )


def _spec(args: argparse.Namespace) -> TableSpec:
    if args.format == "table":
        if args.schema is None:
            raise UserError("--schema is missing; `mlet prepare table` needs a YAML description of the columns")
        for name, value in (("--min-count", args.min_count), ("--split", args.split), ("--seed", args.seed)):
            if value is not None:
                raise UserError(f"{name} goes with criteo and avazu; of a table, {args.schema} says it")
        spec = load_table(Path(args.schema))
    else:
        if args.schema is not None:
            raise UserError(f"--schema goes with `mlet prepare table`; the columns of {args.format} are known")
        known = criteo if args.format == "criteo" else avazu
        spec = known(MIN_COUNT if args.min_count is None else args.min_count, _split(args))
    if args.max_malformed is not None:
        if not 0 <= args.max_malformed <= 1:
            raise UserError(f"--max-malformed {args.max_malformed} is not a share from 0 to 1")
        spec = replace(spec, max_malformed=args.max_malformed)
    return spec


def _split(args: argparse.Namespace) -> SplitRule | None:
    if args.seed is not None and args.split != "random" and not (args.format == "avazu" and args.split != "rows"):
        raise UserError("--seed goes with --split random")
    seed = 0 if args.seed is None else args.seed
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; it must be a whole number, 0 or more")
    if args.split == "paper" and args.format == "criteo":
        return PAPER_CRITEO_ROWS if len(args.raw) == 1 else PAPER_CRITEO_FILES
    if args.split == "rows" or (args.split is None and args.format == "criteo"):
        return SplitRule("rows")
    return replace(PAPER_AVAZU, seed=seed)


def _shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not i/N with i from 0 to N-1, such as 0/8")
    return Shard(int(index), int(count))
