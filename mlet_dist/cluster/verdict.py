"""What the failure of an attempt means for this node: its reason, whether it counts here, how the command ends.

When one rank ends, the others fail too, each in its own way: gloo reports a lost connection, NCCL's watchdog aborts
the process, and the launcher kills what still waits. The first failure that the nodes were told is the reason.
"""

from dataclasses import dataclass

from mlet_dist.cluster.failure import CONSEQUENCES, Failure, Kind
from mlet_dist.cluster.rank_errors import RankAborted, RanksKilled
from mlet_dist.errors import ConnectionLost, Interrupted, NodesMissing, RanksLost, UserError


@dataclass(frozen=True)
class Verdict:
    """How an attempt has ended on this node.

    Attributes:
        error: what to raise if the command ends.
        failure: the reason, which may be another node's.
        is_own: whether it counts against this node, because its rank crashed or hung.
    """

    error: BaseException
    failure: Failure
    is_own: bool


def kind_of(error: BaseException, *, on_cuda: bool) -> Kind:
    """Return the kind of failure of which an attempt's error tells.

    Args:
        error: as ``run_ranks`` raises it.
        on_cuda: whether the ranks use NCCL.
    """
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "stopped"
    if isinstance(error, UserError):
        return "input"
    if isinstance(error, NodesMissing | RanksKilled):
        return "lost"
    if isinstance(error, ConnectionLost):
        return "connection"
    if isinstance(error, RankAborted) and on_cuda:
        return "aborted"
    return "timeout" if isinstance(error, RanksLost) else "crash"


def judge(error: BaseException, own: Failure, told: Failure | None, *, hung: bool, is_alone: bool) -> Verdict:
    """Judge an attempt that failed, other than by a signal to stop or an input error of this node.

    Args:
        error: as ``run_ranks`` raises it.
        own: the same for the other nodes.
        told: what all nodes were told first; None if it is not known.
        hung: whether the launcher had to kill a rank that hung.
        is_alone: whether the job has no other node.
    """
    is_first = told is None or told.node == own.node
    knows_more = own.kind not in CONSEQUENCES and not isinstance(error, RanksKilled)
    failure = own if told is None or (is_first and told.kind == own.kind and knows_more) else told
    # Where others found that a collective timed out, the rank that had to be killed is the one that hung.
    hung = hung or (isinstance(error, RanksKilled) and failure.kind == "timeout")
    if own.kind == "aborted" or isinstance(error, RankAborted):
        is_own = is_first
    else:
        is_own = own.kind == "crash" or (own.kind == "connection" and is_alone)
    follows = isinstance(error, RankAborted) and not is_first
    if isinstance(error, RanksKilled):
        error = RanksLost(failure.text) if hung else ConnectionLost(failure.text)
    elif follows or (isinstance(error, ConnectionLost) and told is not None):
        error = ConnectionLost(f"another rank has ended: {failure.text}")
    if failure.kind == "input":
        error = UserError(failure.text)
    return Verdict(error, failure, hung or is_own)
