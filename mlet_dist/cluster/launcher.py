"""Start a command in ranks on this node, as the only node or as one of several."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from mlet_dist.checkpoint.manifest import ManifestError
from mlet_dist.cluster.attempt import run_elastic
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.preflight import collect_report, find_problems
from mlet_dist.cluster.registration import RendezvousRound, wait_for_node_0
from mlet_dist.cluster.rendezvous import Rendezvous
from mlet_dist.cluster.restarts import RestartLimit, Supervisor
from mlet_dist.cluster.stop_request import StopRequest
from mlet_dist.config.config_file import Config
from mlet_dist.errors import NodesMissing, RanksLost, UserError
from mlet_dist.node_log import log_of_node
from mlet_dist.training.attempts import finished_summary, run_to_replace
from mlet_dist.training.run_directory import RunDirectory


def launch(
    nproc: int,
    arguments: Sequence[str],
    nodes: Nodes | None,
    job: str,
    check: Callable[[], Config | None],
    max_restarts: int = 0,
) -> None:
    """Run the ranks of this node, after all nodes have joined and every check has passed.

    Args:
        nproc: the number of ranks on this node.
        arguments: the command line of each rank, after ``python -m mlet_dist``.
        nodes: the nodes of the job; None if this is the only one.
        job: the id of the job.
        check: returns the config that the command will use; raises UserError if the command cannot run on this node.
        max_restarts: how often in a row, without a new checkpoint in between, the ranks are restarted after a failure
            of this node. If 0, they are not restarted after a failure of another node either.

    Raises:
        UserError: a check failed on this node, or on another one if the number of nodes is fixed: then all nodes
            raise the same error.
        NodesMissing: not all nodes joined in time.
        ConnectionLost: another node was lost, or one of its ranks.
        Exception: as ``attempt.run_ranks`` raises.
    """
    if nodes is not None and nodes.is_elastic:  # the nodes join one by one and are not compared
        config = check()
        _check_devices(nproc, config)
        if nodes.rank > 0:
            wait_for_node_0(nodes)
        run_elastic(nproc, arguments, nodes, job, on_cuda=_uses_cuda(config))
        return
    with StopRequest() as stop:
        node = _Node(nproc, nodes, job, check, stop)
        limit = RestartLimit(max_restarts, node.latest_step)
        if nodes is None:
            node.check()
        Supervisor(nproc, arguments, nodes, job, stop, limit, node.uses_cuda, node.has_replaced).run(
            None if nodes is None else node.meet
        )
    stop.check()


class _Node:
    """This node: its checks, and its rendezvous with the others.

    Args:
        nproc, nodes, job, check: as for ``launch``.
        stop: the signals that arrive.
    """

    def __init__(
        self, nproc: int, nodes: Nodes | None, job: str, check: Callable[[], Config | None], stop: StopRequest
    ) -> None:
        self._nproc, self._nodes, self._check = nproc, nodes, check
        self._config: Config | None = None
        self._run_before: str | None = None
        self._has_started = False
        self._rendezvous = None if nodes is None else Rendezvous(nodes, job, stop.check)

    def check(self) -> None:
        """Check the config and the devices.

        Raises:
            UserError: the command cannot run on this node.
        """
        self._config = self._check()
        _check_devices(self._nproc, self._config)
        if not self._has_started:
            self._has_started, self._run_before = True, self._run_now()

    def has_replaced(self) -> bool:
        """Return whether the ranks have replaced the run that ``run.dir`` held before the job, if they are to."""
        return self._run_before is None or self._run_now() != self._run_before

    def _run_now(self) -> str | None:
        return None if self._config is None else run_to_replace(self._config)

    def uses_cuda(self) -> bool:
        """Return whether the ranks use NCCL."""
        return _uses_cuda(self._config)

    def meet(self, number: int, cause: str) -> RendezvousRound | None:
        """Check this node, exchange reports with the other nodes, and return the rendezvous round of all nodes.

        Returns None if a rank has failed when the run had finished: then its ranks need no other node, and nodes whose
        ranks have all succeeded have ended.
        """
        if number and self._has_finished():
            return None
        try:
            return self._meet(number, cause)
        except NodesMissing:
            if number and self._has_finished():  # this node's view of shared storage was not current before
                return None
            raise

    def _meet(self, number: int, cause: str) -> RendezvousRound:
        assert self._nodes is not None
        assert self._rendezvous is not None
        problem = ""
        try:
            self.check()
        except UserError as error:
            problem = str(error)
        if self._nodes.count > 1 and number == 0:
            log_of_node(self._nodes.rank, self._nodes.count, f"started; joins at {self._nodes.endpoint}")
        own = {"rounds": number, "cause": cause, "run_before": self._run_before, "run_now": self._run_now()}
        with collect_report(f"node {self._nodes.rank}", self._config, problem, self.uses_cuda()) as report:
            try:
                this_round = self._rendezvous.meet(report | own, lambda reports: "; ".join(find_problems(reports)))
            except RanksLost as lost:
                # The other nodes may never receive this node's problems, so that they must be in this node's log.
                for found in report["problems"]:
                    raise UserError(found) from lost
                raise
        self._run_before = this_round.run_before
        return this_round

    def _has_finished(self) -> bool:
        with suppress(UserError):
            return self._config is not None and finished_summary(self._config) is not None
        return False

    def latest_step(self) -> int:
        """Return the step of the run's latest complete checkpoint; -1 if there is none, or it cannot be read."""
        if self._config is None or not self.has_replaced():  # then they are an earlier run's
            return -1
        store = RunDirectory(Path(self._config.run.dir)).checkpoint_store(self._config)
        with suppress(UserError, OSError):
            for checkpoint in reversed(store.checkpoints()):
                with suppress(ManifestError):
                    return checkpoint.manifest().step
        return -1


def _check_devices(nproc: int, config: Config | None) -> None:
    if _uses_cuda(config) and nproc > torch.cuda.device_count():
        raise UserError(
            f"--nproc {nproc}: each rank needs a GPU, but this node has {torch.cuda.device_count()} CUDA devices; "
            "use a smaller --nproc"
        )


def _uses_cuda(config: Config | None) -> bool:
    return (config is None or config.train.device != "cpu") and torch.cuda.is_available()
