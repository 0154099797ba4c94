"""`mlet export`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_checkpoint_choice, add_nproc, byte_size, choice_of, positive
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch, rank_of
from mlet_dist.cli.ranks import run_in_ranks
from mlet_dist.errors import UserError

TEXT = "Collapse the tables W1·W2 of a run into plain TorchRec tables for serving."
EPILOG = """\
The same command again resumes an interrupted export, whose finished work is kept in .NAME.partial beside DIR. The
files are the same for any number of ranks. To export on several hosts, start the ranks by torchrun; DIR must then be on
storage that all hosts share:

  torchrun … -m mlet_dist export RUN --out DIR"""
_ENCODED = ("dcp", "safetensors", "fp16", "int8", "int4")
_TABLES = (*_ENCODED, *(f"{name}-{form}" for form in ("kept", "mixed") for name in _ENCODED))
_OUTPUTS = (*_TABLES, "package")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "run", metavar="RUN", help="directory of a run that `mlet train` made, or of a checkpoint of it"
    )
    add_checkpoint_choice(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory or URL for the export; it must be new or empty"
    )
    parser.add_argument(
        "--outputs", nargs="+", choices=_OUTPUTS, metavar="FORM",
        help="one or more forms to write. dcp: float32 tables for torch.distributed.checkpoint; safetensors: float32 "
        "tables; fp16, int8, int4: TorchRec's quantised tables; package: a scripted model for Python and C++. Of a run "
        "with compression, each has two smaller variants: int8-kept and so on hold only the rows that are stored, and "
        "int8-mixed and so on hold narrow rows as they are, with the W2 to multiply them by (default: dcp)",
    )  # fmt: skip
    parser.add_argument(
        "--dims", nargs="+", type=positive, metavar="R",
        help="export tables of R columns, for one or more R of at most embedding_dim, each to DIR/dimR. A run that was "
        "trained with model.nested_dims has these sizes; the tables of any other are cut to their R longest "
        "directions, which costs quality, and have the -mixed variants of the outputs",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="SIZE",
        help="find the columns, the encoding and the widths of rows with which tables of at most SIZE bytes predict "
        "best on the validation split, print what was tried, and export the best: 20MB, 5%% of the float32 tables, or "
        "12x, a twelfth of them. --outputs may only be package, which is then written, too",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="DATA",
        help="with --dims or --budget: data set, or its URL, whose counts say which rows weigh most, and whose "
        "validation split --budget measures (default: that of the run)",
    )  # fmt: skip
    parser.add_argument(
        "--package-tables", choices=[name for name in _TABLES if "safetensors" not in name], metavar="FORM",
        help="form whose tables the package contains, and which is then written, too: dcp (which is float32), fp16, "
        "int8, int4, or one of their variants (default: int8, or int8-kept if the run does not store all rows)",
    )  # fmt: skip
    parser.add_argument(
        "--serving-ranks", type=positive, metavar="N",
        help="also plan the quantised tables for N serving devices, by TorchRec's shard_quant_model, and write the "
        "plans to the manifest",
    )  # fmt: skip
    parser.add_argument(
        "--serving-device",
        choices=["cpu", "cuda"],
        default="cuda",
        help="kind of the serving devices (default: %(default)s)",
    )
    parser.add_argument(
        "--preprocessing", metavar="DATA",
        help="data set, or its URL, whose vocabularies, means and deviations the export carries, so that a server can "
        "take raw rows; none: carry nothing (default: that of the run, if it can still be read)",
    )  # fmt: skip
    parser.add_argument(
        "--gather", action="store_true", help="write one file for each table, instead of one for every 64 MB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is in DIR")
    parser.add_argument(
        "--memory", type=byte_size, default="512M", metavar="SIZE",
        help="memory of each process for rows, besides about 400M for its libraries (default: %(default)s)",
    )  # fmt: skip
    add_nproc(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    _check_options(args)
    if args.nproc is not None:
        return run_in_ranks(args, arguments, lambda: None)
    configure_torch()
    from mlet_dist.export.budget.budget_report import budget_table
    from mlet_dist.export.budget.run_budget import export_within
    from mlet_dist.export.collapse.run_collapse import SMALLEST_INT8, ExportOptions, export_run
    from mlet_dist.export.collapse.run_sizes import export_sizes
    from mlet_dist.export.serving.quantised import Serving

    outputs = ["dcp"] if args.outputs is None else args.outputs
    options = ExportOptions(
        outputs=tuple(name for name in outputs if name != "package"),
        package=(args.package_tables or SMALLEST_INT8) if "package" in outputs else None,
        serving=None if args.serving_ranks is None else Serving(args.serving_ranks, args.serving_device),
        gather=args.gather,
        overwrite=args.overwrite,
        memory=args.memory,
        choice=choice_of(args),
        preprocessing=args.preprocessing,
    )
    if args.budget is not None:
        result = export_within(Path(args.run), args.out, args.budget, options, args.data)
        if not args.json and not rank_of(args):
            print_text(budget_table(result))
        return (result if args.json else None), True
    if args.dims is not None:
        return export_sizes(Path(args.run), args.out, args.dims, options, args.data), True
    return export_run(Path(args.run), args.out, options), True


def _check_options(args: argparse.Namespace) -> None:
    """Raise UserError if options are given that do not go together."""
    if args.budget is not None and args.dims is not None:
        raise UserError("--budget chooses the columns itself; leave --dims out")
    if args.data is not None and args.dims is None and args.budget is None:
        raise UserError("--data needs --dims or --budget, which read the counts of the data set")
    if args.budget is not None and args.outputs not in (None, ["package"]):
        raise UserError(f"--budget chooses the output itself; leave out --outputs {' '.join(args.outputs)}")
    for name in ("package_tables", "serving_ranks"):
        if args.budget is not None and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} names tables, and --budget chooses them; leave it out")
