"""`--nproc`, on one node or as one node of a job."""

from collections.abc import Callable, Sequence

import torch
from torch import distributed as dist

from mlet_dist.cluster.launcher import run_ranks
from mlet_dist.cluster.meeting import meet, wait_for_first
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.preflight import facts_of, judge
from mlet_dist.cluster.rendezvous import MetNodes
from mlet_dist.config.sections import Config
from mlet_dist.errors import RanksLost, UserError


def launch(
    nproc: int, arguments: Sequence[str], nodes: Nodes | None, job: str, check: Callable[[], Config | None]
) -> None:
    """Run the ranks of this node, once all nodes are there and nothing is wrong on any.

    Args:
        check: what the command will run with; raises what is wrong with it on this node.

    Raises:
        UserError: here or on another node something is wrong; with a fixed number of nodes all of them say so.
        Exception: as ``run_ranks``.
    """
    if nodes is None or nodes.is_elastic:  # the nodes of an elastic job come one by one
        config = check()
        _check_devices(nproc, config)
        if nodes is not None and nodes.rank > 0:
            wait_for_first(nodes)
        run_ranks(nproc, arguments, nodes, job)
        return
    store = _meet(nproc, nodes, job, check)
    MetNodes(nodes, job, store).register()
    run_ranks(nproc, arguments, nodes, job)


def _meet(nproc: int, nodes: Nodes, job: str, check: Callable[[], Config | None]) -> dist.TCPStore:
    config, problem = None, ""
    try:
        config = check()
        _check_devices(nproc, config)
    except UserError as error:
        problem = str(error)
    with facts_of(f"node {nodes.rank}", config, problem, _on_cuda(config)) as facts:
        try:
            return meet(nodes, job, facts, lambda told: "; ".join(judge(told)))
        except RanksLost as lost:
            # Others may never learn of what is wrong here, but whoever reads this log does.
            for mine in facts["problems"]:
                raise UserError(mine) from lost
            raise


def _on_cuda(config: Config | None) -> bool:
    return (config is None or config.train.device != "cpu") and torch.cuda.is_available()


def _check_devices(nproc: int, config: Config | None) -> None:
    if _on_cuda(config) and nproc > torch.cuda.device_count():
        raise UserError(
            f"--nproc {nproc}: this node has {torch.cuda.device_count()} CUDA devices, and a rank takes one"
        )
