"""Runs a command as several ranks on this node (`--nproc`)."""

import argparse
from collections.abc import Callable

from mlet_dist.cli.options import nodes_of, without_launch_options
from mlet_dist.cli.process import configure_torch, make_children_die_with_parent, mark_children_as_ranks
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError


def run_in_ranks(
    args: argparse.Namespace, arguments: list[str], check: Callable[[], Config | None]
) -> tuple[None, bool]:
    """Run the same command as ``args.nproc`` ranks on this node, which may be one of several nodes.

    Args:
        check: returns the config of the command; raises UserError if it cannot run on this node.
    """
    rest = without_launch_options(arguments)
    nodes, job = nodes_of(args, rest)
    if nodes is not None and nodes.is_elastic and getattr(args, "max_restarts", None):
        raise UserError(
            f"--max-restarts needs a fixed number of nodes, and --nnodes is {args.nnodes}; torch elastic restarts the "
            "ranks of such a job by itself"
        )
    if nodes is None or nodes.is_elastic:
        config = check()  # check before torch is imported
        check = lambda: config  # noqa: E731
    mark_children_as_ranks()
    make_children_die_with_parent()
    configure_torch()
    from mlet_dist.cluster.launcher import launch

    launch(args.nproc, rest, nodes, job, check, getattr(args, "max_restarts", None) or 0)
    return None, True
