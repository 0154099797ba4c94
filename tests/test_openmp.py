"""OpenMP's settings: what is chosen, what is left to the user, and that torch and the ranks of a job have it."""

import os
import subprocess
import sys

import pytest

from mlet_dist.openmp import SPIN_COUNT, thread_environment

_CLEARED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MLET_OPENMP", "LOCAL_WORLD_SIZE")
_CONFIGURE = "from mlet_dist.cli.process import configure_torch; configure_torch()"
_SHOW = "import os, torch; print(torch.get_num_threads(), os.environ.get('GOMP_SPINCOUNT'))"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def test_threads_spin_for_a_bounded_time() -> None:
    found = thread_environment(1, {})
    assert found["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
    assert "OMP_NUM_THREADS" not in found
    assert 0 < SPIN_COUNT < 20_000


@pytest.mark.parametrize(
    ("ranks", "threads", "spins"), [(2, "4", True), (3, "2", True), (8, "1", False), (9, "1", False)]
)
def test_ranks_share_the_cores(ranks: int, threads: str, spins: bool) -> None:
    found = thread_environment(ranks, {})
    assert found["OMP_NUM_THREADS"] == threads
    assert found["GOMP_SPINCOUNT"] == (str(SPIN_COUNT) if spins else "0")


def test_more_threads_than_cores_do_not_spin() -> None:
    found = thread_environment(3, {"OMP_NUM_THREADS": "4"})
    assert "OMP_NUM_THREADS" not in found
    assert found["GOMP_SPINCOUNT"] == "0"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_sets_is_left_alone(name: str) -> None:
    assert thread_environment(1, {name: "5"}) == {}
    assert thread_environment(2, {name: "5", "OMP_NUM_THREADS": "3"}) == {}


def test_ranks_choose_anew_what_their_launcher_has_chosen_for_itself() -> None:
    launcher = thread_environment(1, {})
    assert launcher["GOMP_SPINCOUNT"] != "0"
    assert thread_environment(16, launcher)["GOMP_SPINCOUNT"] == "0"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}, "2 7"),
        ({"OMP_NUM_THREADS": "1"}, "1 0"),
        ({"LOCAL_WORLD_SIZE": "64"}, "1 0"),
    ],
)
def test_a_process_of_mlet_has_the_settings(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _CLEARED} | given
    command = [sys.executable, "-c", f"{_CONFIGURE}; {_SHOW}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == expected
