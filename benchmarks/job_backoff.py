"""Simulate what a fault costs on Kubernetes: the waits of the Job controller, and the restart of the ranks.

    .venv/bin/python benchmarks/job_backoff.py

The controller's rule is that of k8s.io/kubernetes, pkg/controller/job/backoff_utils.go: a new pod comes 10 s after the
last failed pod ended, twice that for each further failure, at most 600 s. With `backoffLimit` it counts the failed pods
of the Job since a pod succeeded, with `backoffLimitPerIndex` those of the index. Both also count the failures that a
`podFailurePolicy` ignores. A JobSet creates its Jobs again with new counters. Ranks that restart in place end no pod.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FIRST_S, MOST_S = 10.0, 600.0


@dataclass
class JobController:
    """Counts the failed pods of one Job, and delays the pods that replace them.

    Attributes:
        per_index: whether the Job has `backoffLimitPerIndex`.
    """

    per_index: bool
    _failures: Counter[int] = field(default_factory=Counter)

    def delay(self, failed: Sequence[int]) -> float:
        """Return the seconds from the end of the pods with these indexes until all of them are created again."""
        self._failures.update(failed if self.per_index else [0] * len(failed))
        count = max(self._failures[index if self.per_index else 0] for index in failed)
        return float(min(FIRST_S * 2 ** min(count - 1, 63), MOST_S))


@dataclass(frozen=True)
class Seconds:
    """What the simulation does not compute.

    Attributes:
        ranks: from the start of the processes to the first step.
        pod: from the creation of a pod to the start of its process, with the image on the machine; for a JobSet, with
            the deletion of the old pods.
    """

    ranks: float
    pod: float


Fault = Callable[[JobController, int, random.Random], float]


def _all_pods_end(controller: JobController, nodes: int, _: random.Random) -> float:
    return controller.delay(range(nodes))


def _a_pod_is_lost(controller: JobController, nodes: int, chosen: random.Random) -> float:
    return controller.delay([chosen.randrange(nodes)])


def _the_same_pod_is_lost(controller: JobController, nodes: int, _: random.Random) -> float:
    return controller.delay([0])


def lost_seconds(fault: Fault, per_index: bool, nodes: int, faults: int, trials: int) -> list[float]:
    """Return the delays of the 1st, 2nd, … fault of a Job, as means over the trials."""
    sums = [0.0] * faults
    for seed in range(trials):
        controller, chosen = JobController(per_index), random.Random(seed)
        for number in range(faults):
            sums[number] += fault(controller, nodes, chosen)
    return [each / trials for each in sums]


def table(node_counts: Sequence[int], faults: int, trials: int, seconds: Seconds) -> str:
    """Return a Markdown table of the seconds from a fault to the next step."""
    rows: list[tuple[str, str, list[float]]] = []
    new_pods = seconds.pod + seconds.ranks
    for name, fault, per_index in (
        ("`backoffLimit`, every fault ends all pods", _all_pods_end, False),
        ("`backoffLimitPerIndex`, every fault ends all pods", _all_pods_end, True),
        ("`k8s/job`, a pod is lost, at random", _a_pod_is_lost, True),
        ("`k8s/job`, always the pod of the same node is lost", _the_same_pod_is_lost, True),
    ):
        found: dict[int | str, list[float]] = {
            nodes: lost_seconds(fault, per_index, nodes, faults, trials) for nodes in node_counts
        }
        if len({tuple(delays) for delays in found.values()}) == 1:
            found = {"any": next(iter(found.values()))}
        rows += [(name, str(nodes), [each + new_pods for each in delays]) for nodes, delays in found.items()]
    rows.append(("`k8s/job`, `k8s/jobset`, `k8s/trainjob`, a rank crashes", "any", [seconds.ranks] * faults))
    rows.append(("`k8s/jobset`, `k8s/trainjob`, a pod is lost", "any", [new_pods] * faults))
    head = ["manifest and fault", "nodes", *(f"{number + 1}." for number in range(faults))]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (faults + 1)]
    lines += [f"| {name} | {nodes} | {' | '.join(f'{each:.0f}' for each in found)} |" for name, nodes, found in rows]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--trials", type=int, default=1000, help="of faults at random nodes (default: %(default)s)")
    parser.add_argument("--ranks-s", type=float, default=13.0, help="restart of the ranks (default: %(default)s s)")
    parser.add_argument("--pod-s", type=float, default=5.0, help="a new pod, an assumption (default: %(default)s s)")
    args = parser.parse_args()
    print(table(args.nodes, args.faults, args.trials, Seconds(args.ranks_s, args.pod_s)))


if __name__ == "__main__":
    main()
