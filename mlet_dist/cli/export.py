"""`mlet export`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_nproc, byte_size, positive
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import before_torch, in_ranks

TEXT = "Collapse W1·W2 of a finished run into plain TorchRec tables; torchrun -m mlet_dist export … does on many hosts."
EPILOG = """\
The same command goes on from what an interrupted one has finished, which is kept in .NAME.partial beside DIR. On
several hosts, DIR must be on storage that they share. The files are the same for any number of ranks."""
_OUTPUTS = ("dcp", "safetensors", "fp16", "int8", "int4", "package")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("run", metavar="RUN", help="what `mlet train` made")
    parser.add_argument("--out", required=True, metavar="DIR", help="the export; must not exist or be empty")
    parser.add_argument(
        "--outputs", nargs="+", choices=_OUTPUTS, default=["dcp"], metavar="FORM",
        help="what it is to hold, of: dcp (for torch.distributed.checkpoint), safetensors, TorchRec's quantised tables "
        "in fp16, int8, int4, and package, a scripted model for Python and C++ (default: dcp)",
    )  # fmt: skip
    parser.add_argument(
        "--package-tables", choices=["dcp", "fp16", "int8", "int4"], default="int8",
        help="the form whose tables go into the package, which is then made too (default %(default)s; dcp is float32)",
    )  # fmt: skip
    parser.add_argument(
        "--serving-ranks", type=positive, metavar="N",
        help="plan quantised tables for N devices by TorchRec's shard_quant_model; the plans are in the manifest",
    )  # fmt: skip
    parser.add_argument(
        "--serving-device", choices=["cpu", "cuda"], default="cuda", help="their kind (default %(default)s)"
    )
    parser.add_argument("--gather", action="store_true", help="one file a table, instead of one every 64 MB")
    parser.add_argument("--overwrite", action="store_true", help="replace the export that DIR is")
    parser.add_argument(
        "--memory", type=byte_size, default="512M", metavar="SIZE",
        help="for the rows that a process holds, beside some 400M for its libraries (default %(default)s)",
    )  # fmt: skip
    add_nproc(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    if args.nproc is not None:
        return in_ranks(args, arguments, lambda: None)
    before_torch()
    from mlet_dist.export.collapse.run_collapse import ExportOptions, export_run
    from mlet_dist.export.serving.quantised import Serving

    options = ExportOptions(
        outputs=tuple(name for name in args.outputs if name != "package"),
        package=args.package_tables if "package" in args.outputs else None,
        serving=None if args.serving_ranks is None else Serving(args.serving_ranks, args.serving_device),
        gather=args.gather,
        overwrite=args.overwrite,
        memory=args.memory,
    )
    return export_run(Path(args.run), Path(args.out), options), True
