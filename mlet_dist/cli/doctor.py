"""`mlet doctor`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_nodes, add_nproc, load_checked_config
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch, rank_of
from mlet_dist.cli.ranks import run_in_ranks
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

TEXT = "Check the versions, devices and memory of this machine, or the ranks of a job, and suggest fixes."
EPILOG = """\
Without options the command checks this machine. Before a job of many ranks, check its ranks, with the options that
will start the job:

  mlet doctor --distributed CONFIG data.path=… run.dir=… --nproc 8 --nnodes 4 --node-rank I --master-addr HOST
  torchrun … -m mlet_dist doctor --distributed CONFIG data.path=… run.dir=…

Every rank checks its versions, its environment variables of gloo and NCCL, /dev/shm, the data set, and the storage
that it will write to. All ranks then join an all-reduce, which is timed. If a check fails, every rank reports it and
ends.

With --calibrate FILE all ranks then measure, within a minute, the latency and bandwidth of collectives in groups of
several sizes, the bandwidth of rows, the rate of matrix products and the host's own work in a step. Give the file to
`mlet plan --calibration FILE`. Measure on the ranks, with the threads and at the load of the job that you plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--distributed", action="store_true", help="check all ranks of a job instead of this machine")
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="the config of the job (with --distributed), whose data and storage are then checked, too",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace those of the file"
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", help="measure the ranks' rates and write FILE, for `mlet plan --calibration`"
    )
    add_nproc(parser)
    add_nodes(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    from mlet_dist.cluster.software_checks import format_checks

    if args.distributed:
        return _check_ranks(args, arguments)
    for name in ("config", "nproc", "nnodes", "calibrate"):
        if getattr(args, name) is not None:
            shown = "CONFIG" if name == "config" else f"--{name}"
            raise UserError(f"{shown} needs --distributed; without it, `mlet doctor` checks this machine")
    from mlet_dist.cluster.machine_checks import run_doctor

    result = run_doctor()
    if not args.json:
        print_text(format_checks(result))
        return None, result["ok"]
    return result, result["ok"]


def _check_ranks(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Check the ranks of a job: start them, or be one of them."""
    file = None if args.calibrate is None else Path(args.calibrate)
    # Before all ranks measure for a minute. The first rank, which writes, is on node 0.
    if file is not None and not rank_of(args) and not args.node_rank and not file.parent.is_dir():
        raise UserError(f"--calibrate {file}: there is no directory {file.parent}")
    if args.nproc is not None:
        return run_in_ranks(args, arguments, lambda: None)
    configure_torch()
    from mlet_dist.cluster.rank_checks import check_ranks
    from mlet_dist.cluster.software_checks import format_checks

    result = check_ranks(None if args.config is None else lambda: load_checked_config(args), file)
    if not rank_of(args):
        print_text(to_json(result) if args.json else format_checks(result))
    if result["wrong"]:
        raise UserError("; ".join(result["wrong"]))
    return None, True
