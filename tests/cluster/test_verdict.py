"""What each node makes of the first failure that all were told, and of how its own ranks have ended."""

import pytest

from mlet_dist.cluster.failure import Failure
from mlet_dist.cluster.rank_errors import RankAborted, RanksKilled
from mlet_dist.cluster.verdict import Verdict, judge, kind_of
from mlet_dist.errors import ConnectionLost, RanksLost, UserError

CRASH = Failure("crash", 1, "node 1 on b: rank 3 was killed")
LOST = Failure("lost", 1, "node 1 on b is lost: it has given no sign of life for 15 s")
TIMEOUT = Failure("timeout", 1, "rank 0 on a took no part in a collective for 5 s")
ABORTED = RankAborted("rank 0 on a was killed by signal 6 (SIGABRT)")


def judged(
    error: Exception, told: Failure | None, *, on_cuda: bool = False, hung: bool = False, is_alone: bool = False
) -> Verdict:
    """Judge an error of node 0."""
    own = Failure(kind_of(error, on_cuda=on_cuda), 0, f"node 0 on a: {error}")
    return judge(error, own, told, hung=hung, is_alone=is_alone)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("told", [CRASH, LOST, Failure("aborted", 1, "node 1 on b: rank 3 was aborted (SIGABRT)")])
def test_a_rank_that_was_aborted_after_its_peer_had_gone_is_no_crash(told: Failure, on_cuda: bool) -> None:
    verdict = judged(ABORTED, told, on_cuda=on_cuda)
    assert isinstance(verdict.error, ConnectionLost)
    assert str(verdict.error) == f"another rank has ended: {told.text}"
    assert (verdict.failure, verdict.is_own) == (told, False)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_rank_that_was_aborted_first_is_a_crash(on_cuda: bool, is_alone: bool) -> None:
    """Also if no other node knows a reason; otherwise a job that aborts each time would restart for ever."""
    told = None if is_alone else Failure("aborted" if on_cuda else "crash", 0, "node 0 on a: rank 0 was aborted")
    verdict = judged(ABORTED, told, on_cuda=on_cuda, is_alone=is_alone)
    assert verdict.error is ABORTED
    assert verdict.is_own


def test_ranks_that_the_launcher_killed_for_another_are_no_crash() -> None:
    for told in (CRASH, LOST):
        verdict = judged(RanksKilled("the ranks were killed"), told)
        assert isinstance(verdict.error, ConnectionLost)
        assert (str(verdict.error), verdict.is_own) == (told.text, False)


def test_a_rank_that_had_to_be_killed_after_a_timeout_is_the_one_that_hung() -> None:
    verdict = judged(RanksKilled("the ranks were killed"), TIMEOUT)
    assert type(verdict.error) is RanksLost
    assert verdict.is_own


def test_a_lost_connection_is_shown_with_its_reason() -> None:
    verdict = judged(ConnectionLost("another rank has ended; see that rank's error for the reason"), CRASH)
    assert str(verdict.error) == "another rank has ended: node 1 on b: rank 3 was killed"
    assert not verdict.is_own


@pytest.mark.parametrize(("is_alone", "is_own"), [(True, True), (False, False)])
def test_a_lost_connection_counts_only_where_no_other_node_can_be_the_reason(is_alone: bool, is_own: bool) -> None:
    assert judged(ConnectionLost("another rank has ended"), None, is_alone=is_alone).is_own == is_own


def test_each_of_two_nodes_that_crash_counts_its_own() -> None:
    error = ChildProcessError("rank 0 on a was killed by signal 9 (SIGKILL)")
    verdict = judged(error, CRASH)
    assert verdict.error is error
    assert verdict.is_own


def test_what_a_node_knows_of_its_own_crash_replaces_what_it_told_early() -> None:
    error = ChildProcessError("rank 0 on a failed with exit code 1: KeyError: 'boom'")
    verdict = judged(error, Failure("crash", 0, "node 0 on a: rank 0 has failed; see its log"))
    assert verdict.failure.text == "node 0 on a: rank 0 on a failed with exit code 1: KeyError: 'boom'"


def test_an_input_error_elsewhere_ends_this_node_with_it() -> None:
    verdict = judged(ConnectionLost("another rank has ended"), Failure("input", 1, "data.path: no such data set"))
    assert isinstance(verdict.error, UserError)
    assert str(verdict.error) == "data.path: no such data set"
