"""The arguments of ``mlet prepare``: the raw files, the description of the table and the rule of its splits."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlet_dist.data.prepare.file_lists import expand
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.passes import Shard
from mlet_dist.data.prepare.pipeline import Resources, prepare
from mlet_dist.data.prepare.raw_files import inspect_file
from mlet_dist.data.prepare.raw_formats import RAW_FORMATS, JsonLines, TableSpec, TextFormat
from mlet_dist.data.prepare.splits import PAPER_AVAZU, PAPER_CRITEO_FILES, PAPER_CRITEO_ROWS, SplitRule
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import SPLITS, DatasetSchema
from mlet_dist.errors import UserError

DEFAULT_MIN_COUNT = 2


def prepare_from(args: argparse.Namespace) -> DatasetSchema | None:
    """Run ``prepare`` with the command line's arguments."""
    if args.format is None:
        raise UserError(f"the format is missing; it is {', '.join(RAW_FORMATS)} or table (see `mlet prepare --help`)")
    raw = _raw_arguments(args)
    if args.out is None:
        raise UserError("--out is missing; name the directory for the data set (see `mlet prepare --help`)")
    if args.grow and args.like is None:
        raise UserError("--grow goes with --like, which names the data set whose vocabularies grow")
    like = None if args.like is None else LikeDataset.open(args.like, grows=args.grow)
    return prepare(
        _spec(args) if like is None else _spec_like(args, like),
        raw,
        args.out,
        like=like,
        resources=Resources(args.memory, args.processes),
        only=args.only,
        shard=None if args.shard is None else _shard(args.shard),
    )


def _raw_arguments(args: argparse.Namespace) -> list[str] | dict[str, list[str]]:
    """Return the raw files, or the list of each split if --train, --valid or --test names some."""
    lists = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if not lists:
        if not args.raw:
            raise UserError("no raw file was given; name at least one (see `mlet prepare --help`)")
        return list(args.raw)
    if args.raw and "train" in lists:
        raise UserError(
            f"{args.raw[0]}: is given beside --train, but files without an option are train; use one of them"
        )
    if args.split is not None:
        raise UserError(f"--split {args.split} goes without --{next(iter(lists))}, which names the files of a split")
    return lists if not args.raw else {"train": list(args.raw), **lists}


def _first_columns(args: argparse.Namespace, text: TextFormat | JsonLines | None) -> tuple[str, ...]:
    """Return the columns of the first raw file that has rows."""
    given = args.raw or args.train or args.valid or args.test
    columns = (inspect_file(path, text, ()).columns for path in expand(given or ()))
    return next(filter(None, columns), ())


def _spec(args: argparse.Namespace) -> TableSpec:
    if args.format == "table":
        if args.schema is None:
            raise UserError("--schema is missing; `mlet prepare table` needs a YAML description of the columns")
        for name, value in (("--min-count", args.min_count), ("--split", args.split), ("--seed", args.seed)):
            if value is not None:
                raise UserError(f"{name} goes with {' and '.join(RAW_FORMATS)}; for a table, set it in {args.schema}")
        spec = load_table(Path(args.schema), partial(_first_columns, args))
        given = next((split for split in SPLITS if getattr(args, split)), None)
        if given is not None and (spec.split.by != "file" or spec.split.files) and spec.split != SplitRule("rows"):
            raise UserError(f"--{given} names the files of a split, but {args.schema} has a split of its own; use one")
    else:
        if args.schema is not None:
            raise UserError(f"--schema goes with `mlet prepare table`; {args.format} has fixed columns")
        spec = RAW_FORMATS[args.format](DEFAULT_MIN_COUNT if args.min_count is None else args.min_count)
        spec = replace(spec, split=_split_rule(args, default=spec.split))
    return _with_max_malformed(args, spec)


def _spec_like(args: argparse.Namespace, like: LikeDataset) -> TableSpec:
    """Return the description of --schema, or else that of the data set of --like, with its rule of splits."""
    like.check_format(args.format)
    lists = [split for split in SPLITS if getattr(args, split)]
    if args.min_count is not None and not args.grow:
        raise UserError("--min-count goes with --grow here: without it, --like takes the vocabularies as they are")
    if args.schema is not None:
        return _spec(args)
    spec = like.description
    if args.format == "table":
        for name, value in (("--split", args.split), ("--seed", args.seed)):
            if value is not None:
                raise UserError(
                    f"{name} goes with {' and '.join(RAW_FORMATS)}; for a table, give the files of each split with "
                    "--train, --valid and --test, or set the split in a description (--schema)"
                )
    else:
        spec = replace(spec, split=_split_rule(args, default=spec.split))
    if spec.split.files is not None and not lists:
        raise UserError(
            f"{like.path}: was split by the names of its files, which are others here; give the files of each split "
            "with --train, --valid and --test"
        )
    if args.min_count is not None:
        sparse = (replace(e, min_count=args.min_count) if e.encoding == "vocabulary" else e for e in spec.sparse)
        spec = replace(spec, sparse=tuple(sparse))
    return _with_max_malformed(args, spec)


def _with_max_malformed(args: argparse.Namespace, spec: TableSpec) -> TableSpec:
    if args.max_malformed is None:
        return spec
    if not 0 <= args.max_malformed <= 1:
        raise UserError(f"--max-malformed {args.max_malformed} is not a share from 0 to 1")
    return replace(spec, max_malformed=args.max_malformed)


def _split_rule(args: argparse.Namespace, default: SplitRule) -> SplitRule:
    """Return the rule of --split and --seed; ``default`` is the format's own rule."""
    match args.split, args.format:
        case None, _:
            rule = default
        case "paper", "criteo":
            rule = PAPER_CRITEO_ROWS if len(args.raw) == 1 else PAPER_CRITEO_FILES
        case "paper", _:
            rule = PAPER_AVAZU
        case by, _:
            rule = SplitRule(by)
    if args.seed is None:
        return rule
    if rule.by != "random":
        raise UserError("--seed goes with --split random")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; it must be a whole number, 0 or more")
    return replace(rule, seed=args.seed)


def _shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not i/N with i from 0 to N-1, such as 0/8")
    return Shard(int(index), int(count))
