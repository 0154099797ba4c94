"""The collectives of a training step, counted by process group, and their latency.

Tables with the same sharding type and exchange share their collectives, so one more table costs a group nothing. The
gradients of W2, the dense layers and replicated rows share one all-reduce.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.types import ShardingType

from mlet_dist.embeddings.planning.collective_time import Collective, CollectiveTimes
from mlet_dist.embeddings.sharded.exchange_choice import Exchange

Scope = Literal["all", "node", "cross"]
"""The ranks of a process group: all, those of a node, or one of each node."""

Group = tuple[str, Exchange | None, bool]
"""Tables that share their collectives: a sharding type, an exchange, and whether they are tables of sequences."""

_TABLE_WISE, _TABLE_ROW_WISE = ShardingType.TABLE_WISE.value, ShardingType.TABLE_ROW_WISE.value
_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value

# Lengths and ids of TorchRec's input distribution; the sizes of all groups share one more all-to-all.
_INPUTS: dict[tuple[Collective, Scope], int] = {("all_to_all", "all"): 2}


@dataclass(frozen=True)
class StepCollectives:
    """Collectives of the same kind over the same process group.

    Attributes:
        collective: their kind.
        scope: the ranks of the process group.
        ranks: how many they are.
        nodes: on how many nodes they are.
        count: the number of these collectives in a step.
    """

    collective: Collective
    scope: Scope
    ranks: int
    nodes: int
    count: int

    def latency(self, times: CollectiveTimes) -> float:
        """Return the seconds of all of them, without their bytes."""
        return self.count * times.latency(self.collective, self.ranks, self.nodes)


def step_collectives(groups: Iterable[Group], world_size: int, local_world_size: int) -> list[StepCollectives]:
    """Return the collectives of a step of training.

    Args:
        groups: of all tables, with repetitions or without.
        world_size: R.
        local_world_size: L.
    """
    if world_size == 1:
        return []
    distinct = set(groups)
    # The all-reduce of gradients, and a small one by which ranks agree on what happens next.
    counts: Counter[tuple[Collective, Scope]] = Counter({("all_reduce", "all"): 2})
    for group in distinct:
        counts.update(own_collectives(*group[:2]))
    if any(kind != _DATA_PARALLEL and exchange != "unique_rows" for kind, exchange, _ in distinct):
        counts["all_to_all", "all"] += 1  # the sizes of TorchRec's inputs
    for collection in {sequences for *_, sequences in distinct}:
        if ("unique_rows", collection) not in {(exchange, sequences) for _, exchange, sequences in distinct}:
            counts["all_reduce", "all"] += 1  # the check of the batch, which otherwise travels with the counts
    nodes = -(-world_size // local_world_size)
    sizes = {"all": (world_size, nodes), "node": (min(local_world_size, world_size), 1), "cross": (nodes, nodes)}
    return [StepCollectives(kind, scope, *sizes[scope], count) for (kind, scope), count in sorted(counts.items())]


def own_collectives(sharding_type: str, exchange: Exchange | None) -> dict[tuple[Collective, Scope], int]:
    """Return the collectives that a first table of a group adds to a step."""
    if sharding_type == _DATA_PARALLEL:
        return {}
    if exchange == "unique_rows":
        return {("all_to_all", "all"): 4}  # counts, ids, rows and their gradients
    if sharding_type == _TABLE_WISE:
        return {("all_to_all", "all"): 4}  # lengths, ids, vectors and their gradients
    if sharding_type == _TABLE_ROW_WISE:
        return _INPUTS | {("reduce_scatter", "node"): 1, ("all_gather", "node"): 1, ("all_to_all", "cross"): 2}
    return _INPUTS | {("reduce_scatter", "all"): 1, ("all_gather", "all"): 1}


def latency(groups: Iterable[Group], world_size: int, local_world_size: int, times: CollectiveTimes) -> float:
    """Return the seconds that the collectives of a step take without their bytes."""
    return sum(each.latency(times) for each in step_collectives(groups, world_size, local_world_size))
