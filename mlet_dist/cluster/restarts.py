"""Restarts the ranks of a job in place: after a failure all nodes meet again, and no command ends.

A failure counts against the node whose rank crashed or hung, and against no other.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from mlet_dist.cluster.attempt import run_ranks, shutdown_seconds
from mlet_dist.cluster.failure import CONSEQUENCES, Failure, Kind
from mlet_dist.cluster.heartbeats import Heartbeats
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rank_errors import RankAborted
from mlet_dist.cluster.rank_watch import RankWatch
from mlet_dist.cluster.registration import RendezvousRound
from mlet_dist.cluster.stop_request import StopRequest
from mlet_dist.cluster.verdict import judge, kind_of
from mlet_dist.errors import NodesMissing, RanksLost
from mlet_dist.node_log import log_of_node
from mlet_dist.training.attempts import mark_attempt

_CAUSE_SECONDS, _LOST_CAUSE_SECONDS = 5.0, 25.0
"""How long to wait for the reason of a failure that may follow from one elsewhere; the second if it may be a lost node.

A connection is lost when a process ends. NCCL's watchdog also aborts a rank whose peer's machine does not answer.
"""

_GRACE_SECONDS: dict[Kind, float] = {
    **{"crash": 5, "connection": 5, "aborted": 5, "lost": 5},
    **{"timeout": 15, "stopped": 15, "rank_stopped": 15, "input": 40},
}
"""How long ranks may take to end by themselves after an attempt has failed.

Without its peers a rank cannot save, and soon ends itself. After a collective has timed out, the ranks that wait need
10 s to find out which of them hang. After an input error, a checkpoint that is being written may be completed (30 s).
"""

Meet = Callable[[int, str], RendezvousRound | None]
"""Lets the nodes meet, given the number of earlier attempts and why the last failed; None if the run has finished."""


class RestartLimit:
    """Counts failures of this node's ranks.

    Args:
        most: how many restarts in a row are allowed without a new checkpoint in between.
        latest_step: returns the step of the latest complete checkpoint, or -1.
    """

    def __init__(self, most: int, latest_step: Callable[[], int]) -> None:
        self.most = most
        self._latest_step = latest_step
        self._used, self._step = 0, -1

    def allows_another(self) -> bool:
        """Count a failure; return whether the ranks may be restarted."""
        step = self._latest_step()
        if step > self._step:
            self._used, self._step = 0, step
        self._used += 1
        return self._used <= self.most


class Supervisor:
    """Runs the ranks of this node, and again after a failure, until they succeed.

    Args:
        nproc, arguments, job: as for ``run_ranks``.
        nodes: the nodes of the job, or None if this is the only one.
        stop: the signals that arrive.
        limit: how many restarts are allowed.
        on_cuda: whether the ranks use NCCL, whose watchdog aborts a rank that has lost another.
        has_replaced: whether earlier attempts have replaced the run that ``run.dir`` held before the job.
    """

    def __init__(
        self,
        nproc: int,
        arguments: Sequence[str],
        nodes: Nodes | None,
        job: str,
        stop: StopRequest,
        limit: RestartLimit,
        on_cuda: Callable[[], bool],
        has_replaced: Callable[[], bool],
    ) -> None:
        self._nproc, self._arguments, self._job = nproc, arguments, job
        self._stop, self._limit, self._on_cuda, self._has_replaced = stop, limit, on_cuda, has_replaced
        self._alone = None if nodes is not None else _own_store()
        self._nodes = nodes or Nodes(1, 1, 0, "localhost", self._alone.port if self._alone is not None else 0, 0)

    def run(self, meet: Meet | None) -> None:
        """Let the nodes meet and run the ranks of this one, again after each failure that allows it.

        Args:
            meet: None if this is the only node.

        Raises:
            ConnectionLost: another node was lost, and restarts are not allowed.
            Exception: as ``meet`` and ``run_ranks`` raise.
        """
        number, cause = 0, "new"
        while True:
            has_replaced, name = self._has_replaced(), uuid.uuid4().hex
            mark_attempt(number, has_replaced=has_replaced)
            this_round = None if meet is None else meet(number, cause)
            if this_round is not None:
                number, has_replaced, name = (
                    this_round.number,
                    this_round.has_replaced,
                    this_round.prefix.rpartition("/")[2],
                )
            mark_attempt(number, name, has_replaced=has_replaced)
            if this_round is not None and this_round.is_unexplained and not self._limit.allows_another():
                raise self._exhausted(RanksLost("the ranks have failed again, and no node knows why"))
            joined = f"all {self._nodes.count} nodes have joined"
            if meet is not None and this_round is None:
                joined = "the run has finished; the other nodes are not needed"
            self._log(joined + f"; restart {number}" * (number > 0))
            found = self._attempt(this_round)
            if found is None:
                self._log("ended: its ranks have succeeded")
                return
            cause = found
            number += 1

    def _attempt(self, this_round: RendezvousRound | None) -> str | None:
        """Run the ranks once; return None if they succeeded, and otherwise why they failed, as the next report says."""
        heartbeats: Heartbeats | None = None

        def report(kind: Kind, text: str) -> None:
            """Tell the other nodes, and end the other ranks of this one, which can neither train nor save any more."""
            watch.kill_all(_GRACE_SECONDS[kind])
            self._tell(heartbeats, kind, text if kind in ("input", "timeout") else f"{name}: {text}")

        has_peers = self._nproc * self._nodes.count > 1
        watch = RankWatch(self._stop.received, shutdown_seconds(), report, has_peers=has_peers, on_cuda=self._on_cuda())
        name = f"node {self._nodes.rank}"
        if this_round is not None and self._nodes.count > 1:
            name = this_round.names[self._nodes.rank]
            heartbeats = Heartbeats(
                self._nodes,
                this_round.prefix,
                this_round.names,
                lambda failure: watch.kill_all(_GRACE_SECONDS[failure.kind]),
            )
        with heartbeats or nullcontext():
            try:
                self._stop.check()
                if this_round is not None and this_round.silent:
                    gone = this_round.names[this_round.silent[0]]
                    raise NodesMissing(f"{gone} joined, but ended before the job started; see its log")
                run_ranks(self._nproc, self._arguments, self._nodes, self._job, watch, self._stop)
            except (Exception, KeyboardInterrupt) as error:
                return self._after(error, watch, heartbeats, name)
            if heartbeats is not None:
                heartbeats.finish()
        return None

    def _after(self, error: BaseException, watch: RankWatch, heartbeats: Heartbeats | None, name: str) -> str:
        """Tell the other nodes why the ranks have failed, and raise the error unless the nodes meet again."""
        kind = kind_of(error, on_cuda=self._on_cuda())
        if kind == "stopped" and self._was_stopped_elsewhere(heartbeats):
            # The ranks of all nodes have saved, and the node that received the signal may be replaced.
            self._leave(heartbeats, kind, "another node was asked to stop by a signal", for_good=False)
            self._log("the ranks were stopped with those of another node; they start again when all nodes have met")
            return kind
        if kind == "stopped":
            asked = kind if self._stop.received else "rank_stopped"
            self._leave(heartbeats, asked, f"{name if self._stop.received else 'a rank'} was asked to stop by a signal")
            raise error
        if kind == "input":
            self._leave(heartbeats, kind, str(error))
            raise error
        prefix = f"{name}: " * (self._nodes.count > 1 and kind != "lost")
        text = "a rank has lost its connection to another rank" if kind == "connection" else str(error)
        own, told = Failure(kind, self._nodes.rank, f"{prefix}{text}"), None
        if heartbeats is not None:
            seconds = 0.0
            if kind in CONSEQUENCES or isinstance(error, RankAborted):
                heartbeats.tell(own)  # unless the watch has
                seconds = _LOST_CAUSE_SECONDS if kind == "aborted" else _CAUSE_SECONDS
            told = heartbeats.wait_for_failure(seconds)
        verdict = judge(error, own, told, hung=watch.hung, is_alone=self._nodes.count == 1)
        failure, error = verdict.failure, verdict.error
        if self._limit.most and failure.kind not in ("input", "rank_stopped"):
            if verdict.is_own and not self._limit.allows_another():
                error = self._exhausted(error)
            else:
                self._leave(heartbeats, failure.kind, failure.text, for_good=False)
                again = "when all nodes have met" if self._nodes.count > 1 else "now"
                self._log(f"the ranks have failed: {failure.text}; they start again {again}")
                if verdict.is_own:
                    return "fault"
                return failure.kind if failure.kind in ("lost", "stopped") else "unknown"
        self._leave(heartbeats, failure.kind, failure.text)
        raise error

    def _was_stopped_elsewhere(self, heartbeats: Heartbeats | None) -> bool:
        """Return whether restarts are allowed, and another node told that it received the signal that ended the ranks.

        Nobody tells so where a signal was sent to a rank alone; then all nodes end. Once a node has found that, it
        tells the others, which may be later.
        """
        if not self._limit.most or heartbeats is None or self._stop.received:
            return False
        told = heartbeats.wait_for_failure(_CAUSE_SECONDS)
        return told is not None and told.kind == "stopped" and told.node != self._nodes.rank and not self._stop.received

    def _exhausted(self, error: BaseException) -> Exception:
        most = self._limit.most
        again = f"restarted {most} time{'s' * (most > 1)} (--max-restarts) without a new checkpoint in between"
        return ChildProcessError(f"{error}; {again}")

    def _tell(self, heartbeats: Heartbeats | None, kind: Kind, text: str) -> None:
        if heartbeats is not None:
            heartbeats.tell(Failure(kind, self._nodes.rank, text))

    def _leave(self, heartbeats: Heartbeats | None, kind: Kind, text: str, *, for_good: bool = True) -> None:
        if heartbeats is not None:
            heartbeats.leave_with(Failure(kind, self._nodes.rank, text), for_good=for_good)

    def _log(self, text: str) -> None:
        if self._nodes.count > 1 or "failed" in text:
            log_of_node(self._nodes.rank, self._nodes.count, text)


def _own_store() -> Any:
    return dist.TCPStore("localhost", 0, None, True, timedelta(minutes=5), wait_for_workers=False)
