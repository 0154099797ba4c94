"""The latency and bandwidth of collectives by kind, size of group and backend: the alpha-beta model.

A collective of n bytes over a group of R ranks on N nodes takes alpha(R, N) + n / beta. ``CollectiveTimes`` gives alpha
from measured groups (``mlet doctor --distributed --calibrate``), or else from the default of the backend.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["nccl", "gloo"]
Collective = Literal["all_to_all", "all_reduce", "reduce_scatter", "all_gather"]

COLLECTIVES: tuple[Collective, ...] = get_args(Collective)

# NVIDIA/nccl, src/graph/tuning.cc, baseLat and hwLat of the LL protocol, in microseconds: a tree all-reduce starts in
# 4.4 and takes 0.52 a hop over NVLink and 5.0 a hop over the network; a ring starts in 3.6 and takes 0.47 and 2.7 a
# hop. Between nodes, LL's hops over NVLink take 1.8 times as long.
_TREE_BASE, _TREE_NODE, _TREE_NETWORK = 4.4e-6, 0.52e-6, 5.0e-6
_RING_BASE, _RING_NODE, _RING_NETWORK = 3.6e-6, 0.47e-6, 2.7e-6
_LL_BETWEEN_NODES = 1.8
# NCCL has no model of its grouped sends and receives. These are estimates, not measured: the start of a kernel and its
# proxies, and the cost of one more peer.
_P2P_BASE, _P2P_NODE, _P2P_NETWORK = 10e-6, 0.5e-6, 0.5e-6
# gloo over TCP: a ring by default (gloo/allreduce.cc), so the hops follow one another; the all-to-all posts all sends
# at once. A message takes about 25 us inside a machine and 40 us between machines (estimates; 0.3 ms were measured for
# an all-reduce of 2 ranks on busy cores, 3.6 ms for one of 8).
_GLOO_BASE, _GLOO_NODE, _GLOO_NETWORK = 50e-6, 25e-6, 40e-6


@dataclass(frozen=True)
class MeasuredGroup:
    """The measured time of one collective in groups of one size.

    Attributes:
        collective: its kind.
        ranks: the number of ranks of a group.
        nodes: the number of nodes of a group.
        latency: seconds of the smallest message.
        bandwidth: bytes that a rank sends, per second, of a large message.
    """

    collective: Collective
    ranks: int
    nodes: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class CollectiveTimes:
    """Latencies of the collectives of a backend, measured for some sizes of groups or for none."""

    backend: Backend
    measured: tuple[MeasuredGroup, ...] = ()

    def latency(self, collective: Collective, ranks: int, nodes: int = 1) -> float:
        """Return alpha in seconds for a group of ``ranks`` ranks on ``nodes`` nodes; 0 for a single rank.

        Where groups of this size were not measured, the nearest size is scaled by the growth of the default.
        """
        if ranks == 1:
            return 0.0
        default = default_latency(self.backend, collective, ranks, nodes)
        nearest = self.nearest(collective, ranks, nodes)
        if nearest is None:
            return default
        of_nearest = default_latency(self.backend, collective, nearest.ranks, nearest.nodes)
        return nearest.latency * default / of_nearest

    def nearest(self, collective: Collective, ranks: int, nodes: int) -> MeasuredGroup | None:
        """Return the measured group of the nearest size, preferably one that crosses nodes as the given one does."""
        own = [group for group in self.measured if group.collective == collective]
        alike = [group for group in own if (group.nodes > 1) == (nodes > 1)] or own
        return min(alike, key=lambda group: (abs(math.log(group.ranks / ranks)), -group.ranks), default=None)


def default_latency(backend: Backend, collective: Collective, ranks: int, nodes: int = 1) -> float:
    """Return alpha in seconds of a group of two ranks or more, without measurements.

    - nccl: all_reduce is a tree, whose latency grows by the ranks of a node and log2 of the nodes; reduce_scatter and
      all_gather are rings, whose latency grows by the ranks; all_to_all sends to every peer.
    - gloo: all_reduce is a ring of 2·(R-1) hops in sequence; the others send to every peer.
    """
    inside, between = ranks - nodes, nodes - 1
    if backend == "gloo":
        hops = 2 if collective == "all_reduce" else 1
        # A ring is as slow as its slowest link at each hop.
        hop = _GLOO_NETWORK if nodes > 1 else _GLOO_NODE
        return _GLOO_BASE + hops * (ranks - 1) * hop
    if collective == "all_to_all":
        of_node = ranks // nodes - 1
        way = _TREE_NETWORK if nodes > 1 else 0.0  # of the last message
        return _P2P_BASE + way + of_node * _P2P_NODE + (ranks - 1 - of_node) * _P2P_NETWORK
    slower = _LL_BETWEEN_NODES if nodes > 1 else 1.0
    ring = inside * _RING_NODE * slower + between * _RING_NETWORK
    if collective != "all_reduce":
        return _RING_BASE + ring
    tree = 2 * ((ranks // nodes - 1) * _TREE_NODE * slower + math.log2(nodes) * _TREE_NETWORK)
    return min(_TREE_BASE + tree, _RING_BASE + 2 * ring)
