"""Bytes, flops and time of one rank, common to tables and dense layers, and the time of a step by part."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from mlet_dist.embeddings.planning.collective_time import CollectiveTimes

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]

FLOAT, INDEX, LENGTH = 4, 8, 4
HOST_OPERATIONS, TABLE_OPERATIONS = 340, 11
"""Operations of torch in a step, as counted by ``tests/embeddings/planning/test_step_collectives.py``, and how many of
them each table adds."""

LAUNCH: dict[str, float] = {"cuda": 5e-6, "cpu": 10e-6}
"""Seconds in which the host starts an operation: dispatch, autograd and the launch of a kernel (estimates)."""

SORTED_IDS: dict[str, float] = {"cuda": 1e9, "cpu": 1e7}
"""Ids per second of ``torch.unique`` with positions, which sorts (estimates)."""

_NCCL = CollectiveTimes("nccl")

RESERVED_SHARE = 0.15
"""The share of a device's memory reserved for the CUDA context, NCCL and fragmentation. TorchRec's default."""


class _Summable:
    """A dataclass of numbers that can be added and scaled."""

    def __add__(self, other: Self) -> Self:
        pairs = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return type(self)(**pairs)

    def times(self, share: float) -> Self:
        """Return the numbers multiplied by ``share``."""
        return type(self)(**{each.name: getattr(self, each.name) * share for each in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Memory(_Summable):
    """Memory of one rank in bytes, by kind; all but ``host`` is memory of the device that computes.

    Attributes:
        weights: this rank's rows of W1, or, for rows in host memory, their cache.
        optimizer: the optimizer state of these rows, and their dense gradient if there is one.
        buffers: temporary memory at the peak of a step, including the activations of the dense layers.
        dense: replicated weights: W2 and the dense layers, with gradients and optimizer state.
        process: on a CPU, what the process takes beside the tensors that live at the peak: libraries, readers, and
            memory of freed tensors that the C library keeps.
        host: rows and optimizer state of UVM kernels in host memory.
        gradients: the part of ``buffers`` that only backward of the tables needs, so that the dense layers can use it.
    """

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    dense: float = 0
    process: float = 0
    host: float = 0
    gradients: float = 0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.optimizer + self.buffers + self.dense + self.process

    @property
    def checkpoint_copy(self) -> float:
        """Bytes of host memory that a copy of this rank's rows, weights and optimizer state takes, at most.

        A checkpoint in the background makes such a copy. Dense gradients, which are counted with the state, are not
        part of it, nor is a cache of rows in host memory.
        """
        return self.weights + self.optimizer + self.dense + self.host


@dataclass(frozen=True)
class Step(_Summable):
    """The work of one rank in a training step, forward and backward.

    A rank has two roles: it owns rows that other ranks request, and it requests rows for its own batch. Links are full
    duplex. Vectors flow from owner to requester in forward, and gradients from requester to owner in backward, so the
    time on a link is determined by the role with more bytes.

    Attributes:
        vector_bytes: vectors and their gradients sent to other ranks (``benchmarks/traffic.py`` measures them).
        index_bytes: ids and lengths sent to other ranks.
        weight_bytes: gradients that are all-reduced, counted once.
        node_owner_bytes: bytes over the link inside the node, as an owner of rows.
        node_requester_bytes: bytes over the link inside the node, for the rank's own batch.
        network_owner_bytes: bytes over the link to other nodes, as an owner of rows.
        network_requester_bytes: bytes over the link to other nodes, for the rank's own batch.
        memory_bytes: bytes read from and written to the device's memory.
        host_bytes: rows and state copied from host memory to the device; as many bytes go back at the same time.
        flops: floating-point operations of W2 and the dense layers.
        sorted_ids: ids among which the distinct ones are found.
        node_reduced_bytes: those of an all-reduce among the bytes over the link inside the node.
        network_reduced_bytes: those of an all-reduce among the bytes over the link to other nodes.
    """

    vector_bytes: float = 0
    index_bytes: float = 0
    weight_bytes: float = 0
    node_owner_bytes: float = 0
    node_requester_bytes: float = 0
    network_owner_bytes: float = 0
    network_requester_bytes: float = 0
    memory_bytes: float = 0
    host_bytes: float = 0
    flops: float = 0
    sorted_ids: float = 0
    node_reduced_bytes: float = 0
    network_reduced_bytes: float = 0

    @property
    def sent_bytes(self) -> float:
        return self.vector_bytes + self.index_bytes + self.weight_bytes


@dataclass(frozen=True)
class Device:
    """The hardware of one rank.

    Attributes:
        name: a name for reports.
        kind: cuda or cpu.
        memory: bytes of the device's memory.
        memory_bandwidth: bytes per second.
        flops: operations per second of matrix products, in the precision of the run.
        node_bandwidth: bytes per second and direction, to ranks of the same node.
        network_bandwidth: bytes per second and direction, to other nodes.
        host_memory: this rank's share of the host's memory in bytes; 0 for a CPU, for which ``memory`` is host memory.
        host_bandwidth: bytes per second and direction, between host and device.
        collectives: the latencies of collectives.
        launch: seconds that one more kernel takes.
        host_step: seconds of the host's own work in a step: Python, TorchRec and torch's dispatch.
        host_table: seconds that each table adds to ``host_step``.
        ids: ids per second among which the distinct ones are found, with their positions.
        reduce_rate: the bandwidth of an all-reduce over that of the links.
        at_peak: whether bandwidths and operations are peak rates, not measured ones.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory: float
    memory_bandwidth: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float
    host_memory: float = 0
    host_bandwidth: float = 0
    collectives: CollectiveTimes = _NCCL
    launch: float = 0
    host_step: float = 0
    host_table: float = 0
    ids: float = math.inf
    reduce_rate: float = 1.0
    at_peak: bool = True

    @property
    def usable_memory(self) -> float:
        """``memory`` without ``RESERVED_SHARE``."""
        return self.memory * (1 - RESERVED_SHARE)

    @property
    def usable_host_memory(self) -> float:
        """``host_memory`` without ``RESERVED_SHARE``."""
        return self.host_memory * (1 - RESERVED_SHARE)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Attributes:
        network: bytes on links, by their bandwidth.
        memory: bytes of the device's memory.
        host: bytes on the link between host and device.
        compute: operations of matrix products.
        sorting: finding the distinct ones among ids.
        latency: what collectives take however few bytes they have.
        floor: the host's own work; on CUDA only what of it exceeds the other parts, since the device runs behind.
        skew: what the busiest owner of rows takes longer than an average one.
    """

    network: float
    memory: float
    host: float
    compute: float
    sorting: float = 0
    latency: float = 0
    floor: float = 0
    skew: float = 0

    @property
    def total(self) -> float:
        """Seconds of a step whose parts follow one another."""
        at_work = self.network + self.memory + self.host + self.compute + self.sorting
        return at_work + self.latency + self.floor + self.skew

    @property
    def lower_bound(self) -> float:
        """Seconds in which links, memory and matrix products work in parallel without pause, whatever else happens.

        It is a lower bound of every run if the device's rates are peak rates.
        """
        return max(self.network, self.memory, self.host, self.compute)

    @property
    def bound(self) -> str:
        """The name of the longest part."""
        parts = {
            "network": self.network,
            "memory bandwidth": self.memory,
            "host link": self.host,
            "compute": self.compute,
            "sorting ids": self.sorting,
            "latency": self.latency,
            "host": self.floor,
            "skew": self.skew,
        }
        return max(parts, key=lambda part: parts[part])


def device_defaults(kind: str) -> dict[str, Any]:
    """Return the attributes of a Device that data sheets do not give: latencies and the host's work."""
    launch = LAUNCH[kind]
    return {
        "collectives": CollectiveTimes("nccl" if kind == "cuda" else "gloo"),
        "launch": launch,
        "host_step": HOST_OPERATIONS * launch,
        "host_table": TABLE_OPERATIONS * launch,
        "ids": SORTED_IDS[kind],
    }


def step_time(step: Step, device: Device) -> StepTime:
    """Return the time of a step's bytes and operations at the device's rates, without latency, host and skew.

    Links inside and between nodes are full duplex and work in parallel.
    """
    slower = 1 / device.reduce_rate - 1
    node = max(step.node_owner_bytes, step.node_requester_bytes) + slower * step.node_reduced_bytes
    network = max(step.network_owner_bytes, step.network_requester_bytes) + slower * step.network_reduced_bytes
    return StepTime(
        network=max(node / device.node_bandwidth, network / device.network_bandwidth),
        memory=step.memory_bytes / device.memory_bandwidth,
        host=step.host_bytes / device.host_bandwidth if step.host_bytes else 0.0,
        compute=step.flops / device.flops,
        sorting=step.sorted_ids / device.ids,
    )


def all_reduce_step(size: float, world_size: int, local_world_size: int) -> Step:
    """Return the traffic of an all-reduce of ``size`` bytes.

    Each of R ranks sends 2·(R-1)/R of the bytes over its link inside the node. Between N nodes, each node sends
    2·(N-1)/N of the bytes, a load that its ranks share.
    """
    if world_size == 1:
        return Step()
    nodes = -(-world_size // local_world_size)
    within = 2 * size * (world_size - 1) / world_size
    between = 2 * size * (nodes - 1) / nodes / local_world_size
    return Step(
        weight_bytes=size,
        node_owner_bytes=within,
        node_requester_bytes=within,
        network_owner_bytes=between,
        network_requester_bytes=between,
        node_reduced_bytes=within,
        network_reduced_bytes=between,
    )


def row_state_bytes(optimizer: Optimizer, width: int) -> int:
    """Return the bytes of one row's optimizer state, float32 for any dtype of the rows, in fused and dense kernels."""
    return {"sgd": 0, "adagrad": FLOAT * width, "rowwise_adagrad": FLOAT, "adam": 2 * FLOAT * width}[optimizer]


def replicated_bytes(elements: int, optimizer: Optimizer) -> int:
    """Return the bytes of replicated weights, gradients and optimizer state; rowwise_adagrad is adagrad for these."""
    states = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}[optimizer]
    return FLOAT * elements * (2 + states)


def total_memory(parts: Iterable[Memory]) -> Memory:
    """Return the sum of ``parts``."""
    return sum(parts, Memory())


def total_step(parts: Iterable[Step]) -> Step:
    """Return the sum of ``parts``."""
    return sum(parts, Step())


def gigabytes(size: float) -> str:
    """Format a size in units of 10^9 bytes, with three digits."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def milliseconds(time: StepTime) -> str:
    """Format the total in milliseconds, with two digits."""
    found = 1e3 * time.total
    return f"{found:.2g} ms" if found < 100 else f"{found:,.0f} ms"
