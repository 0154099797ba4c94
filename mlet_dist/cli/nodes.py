"""The options of a command that runs on several nodes."""

import argparse
from collections.abc import Sequence

from mlet_dist.cli.options import add_nproc, positive
from mlet_dist.cluster.nodes import Nodes, job_of, parse_count, port_of
from mlet_dist.errors import UserError

_LAST_PORT = 65_535


def add_nodes(parser: argparse.ArgumentParser) -> None:
    """Nodes of the job."""
    parser.add_argument(
        "--nnodes", metavar="N", help="this is one of N nodes, or of 2:4 that may leave and come; all get this command"
    )
    parser.add_argument("--node-rank", type=int, metavar="I", help="which one, from 0")
    parser.add_argument("--master-addr", metavar="HOST", help="name or address of node 0")
    parser.add_argument(
        "--master-port", type=positive, metavar="PORT", help="default: one that follows from the command"
    )
    parser.add_argument(
        "--wait", type=positive, default=40, metavar="SECONDS", help="for all nodes to come (default %(default)s)"
    )


def nodes_of(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[Nodes | None, str]:
    """The job's nodes, as checked options say, and its name; None where this is the only node."""
    if getattr(args, "nnodes", None) is None:
        return None, ""
    fewest, count = parse_count(args.nnodes)
    if args.node_rank is None or not 0 <= args.node_rank < count:
        found = "is not set" if args.node_rank is None else f"is {args.node_rank}"
        raise UserError(f"--node-rank {found}; it must be this node's number, from 0 to {count - 1}")
    if count > 1 and args.master_addr is None:
        raise UserError("--master-addr is not set; it must be the name or address of node 0, the same on all nodes")
    job = job_of(arguments, args.nproc, args.nnodes)
    if args.master_port is not None and args.master_port > _LAST_PORT:
        raise UserError(f"--master-port is {args.master_port}; it must be from 1 to {_LAST_PORT}")
    master, port = args.master_addr or "localhost", args.master_port or port_of(job)
    return Nodes(fewest, count, args.node_rank, master, port, args.wait), job


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError where options of nodes lack what they go with."""
    for name in ("node_rank", "master_addr", "master_port"):
        if getattr(args, name, None) is not None and args.nnodes is None:
            raise UserError(f"--{name.replace('_', '-')} is for several nodes; say how many by --nnodes")
    if getattr(args, "nnodes", None) is not None and args.nproc is None:
        raise UserError("--nnodes needs --nproc, the ranks of each node")


def node_count(args: argparse.Namespace) -> int:
    """1 for an elastic job as well, whose ranks check how many they are."""
    count = getattr(args, "nnodes", None) or "1"
    return int(count) if count.isdecimal() else 1


def without_launch(arguments: list[str]) -> list[str]:
    """The command as ranks are given it, and as it is the same on all nodes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_nproc(parser)
    add_nodes(parser)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--export")
    return parser.parse_known_args(arguments)[1]
