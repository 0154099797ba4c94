"""`mlet doctor`."""

import argparse

from mlet_dist.cli.options import add_nodes, add_nproc, load_checked
from mlet_dist.cli.output import Result, write
from mlet_dist.cli.process import before_torch, in_ranks, rank_of
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

TEXT = "Check this machine: versions, devices, memory; says what to type when something is off."
EPILOG = """\
Before a job of many ranks, with the words that will start it:

  mlet doctor --distributed CONFIG data.path=… run.dir=… --nproc 8 --nnodes 4 --node-rank I --master-addr HOST
  torchrun … -m mlet_dist doctor --distributed CONFIG data.path=… run.dir=…

Every rank looks at its versions, its settings of gloo and NCCL, /dev/shm, the data and the storage it will write to,
and all of them take part in an all-reduce, which is timed. Where something is wrong, all say so and end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--distributed", action="store_true", help="check the ranks of a job instead, all of them")
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="of the job: its data and storage are then checked")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="settings, as of train")
    add_nproc(parser)
    add_nodes(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    from mlet_dist.cluster.software_checks import format_checks

    if args.distributed:
        return _of_ranks(args, arguments)
    for name in ("config", "nproc", "nnodes"):
        if getattr(args, name) is not None:
            raise UserError(f"`mlet doctor` looks at this machine; {name} is for --distributed")
    from mlet_dist.cluster.machine_checks import run_doctor

    result = run_doctor()
    if not args.json:
        write(format_checks(result))
        return None, result["ok"]
    return result, result["ok"]


def _of_ranks(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    if args.nproc is not None:
        return in_ranks(args, arguments, lambda: None)
    before_torch()
    from mlet_dist.cluster.rank_checks import check_ranks
    from mlet_dist.cluster.software_checks import format_checks

    result = check_ranks(None if args.config is None else lambda: load_checked(args))
    if not rank_of(args):
        write(to_json(result) if args.json else format_checks(result))
    if result["wrong"]:
        raise UserError("; ".join(result["wrong"]))
    return None, True
