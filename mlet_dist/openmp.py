"""The threads of OpenMP, with which torch computes on a CPU: how many, and how they wait for one another.

It reads its settings from the environment when torch is imported.
"""

import os
from collections.abc import Mapping

SPIN_COUNT = 1_000
"""How often a waiting thread of GNU's OpenMP looks before it sleeps; a measured value, see docs/design/failures.md."""

_CHOSEN = "MLET_OPENMP"  # set with the variables below, so that a process that this one starts chooses anew
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def thread_environment(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set for processes that share this machine; those that the user has set are left out.

    Each of several ranks gets its share of the cores. Threads that wait look for their work for some microseconds and
    then sleep. They sleep at once where ranks have more threads than cores.

    Args:
        ranks: the number of processes.
        environment: what is set already.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {}
    threads = environment.get("OMP_NUM_THREADS", "")
    if ranks > 1 and not threads:
        threads = found["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    if _CHOSEN in environment or not any(name in environment for name in _WAITING):
        of_rank = int(threads) if threads.isdecimal() else cores
        spins = of_rank > 1 and of_rank * ranks <= cores
        # torch for Linux comes with GNU's OpenMP. LLVM's, with which others build it, counts in milliseconds.
        found |= {"GOMP_SPINCOUNT": str(SPIN_COUNT if spins else 0), "KMP_BLOCKTIME": "0", _CHOSEN: "1"}
    return found
