"""Bytes, flops and time of one rank, common to tables and dense layers, and the time of a step at peak rates."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Self

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]

FLOAT, INDEX, LENGTH = 4, 8, 4
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
        host: rows and optimizer state of UVM kernels in host memory.
    """

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    dense: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.optimizer + self.buffers + self.dense


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
        flops: float32 operations per second.
        node_bandwidth: bytes per second and direction, to ranks of the same node.
        network_bandwidth: bytes per second and direction, to other nodes.
        host_memory: this rank's share of the host's memory in bytes; 0 for a CPU, for which ``memory`` is host memory.
        host_bandwidth: bytes per second and direction, between host and device.
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
    """Seconds of a step by part. The parts are assumed not to overlap; kernel launches and waiting are not included."""

    network: float
    memory: float
    host: float
    compute: float

    @property
    def total(self) -> float:
        return self.network + self.memory + self.host + self.compute

    @property
    def bound(self) -> str:
        """The name of the longest part."""
        parts = {
            "network": self.network,
            "memory bandwidth": self.memory,
            "host link": self.host,
            "compute": self.compute,
        }
        return max(parts, key=lambda part: parts[part])


def step_time(step: Step, device: Device) -> StepTime:
    """Return the time of a step at peak rates; links inside and between nodes are full duplex and work in parallel."""
    node = max(step.node_owner_bytes, step.node_requester_bytes)
    network = max(step.network_owner_bytes, step.network_requester_bytes)
    return StepTime(
        network=max(node / device.node_bandwidth, network / device.network_bandwidth),
        memory=step.memory_bytes / device.memory_bandwidth,
        host=step.host_bytes / device.host_bandwidth if step.host_bytes else 0.0,
        compute=step.flops / device.flops,
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
