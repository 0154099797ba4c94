"""Bytes, flops and time: the arithmetic that tables and dense layers share, and a step's time at peak rates."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Self

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]

FLOAT, INDEX, LENGTH = 4, 8, 4
RESERVED_SHARE = 0.15
"""Of a device's memory: for CUDA's context, NCCL and the allocator's gaps. TorchRec's own default."""


class _Summable:
    def __add__(self, other: Self) -> Self:
        pairs = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return type(self)(**pairs)

    def times(self, share: float) -> Self:
        return type(self)(**{each.name: getattr(self, each.name) * share for each in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Memory(_Summable):
    """Bytes of one rank, by kind; all but ``host`` on the device that computes.

    Attributes:
        weights: W1's rows of this rank, or the cache of those that lie in the host's memory.
        optimizer: their optimizer's state, and a dense gradient where there is one.
        buffers: what a step holds at its peak beyond what stays, activations of the dense layers included.
        dense: what every rank holds: W2 and the dense layers, with gradients and optimizer state.
        host: rows and state of UVM kernels, in the memory of the host.
    """

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    dense: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.optimizer + self.buffers + self.dense


@dataclass(frozen=True)
class Step(_Summable):
    """What one rank does in a training step, forward and backward.

    Links carry both directions at once. In each pass vectors flow one way between those that hold rows and those at
    home that look them up, and gradients the other way; so a rank's time is that of the larger of its two roles.

    Attributes:
        vector_bytes: vectors and their gradients sent to other ranks (``benchmarks/traffic.py``).
        index_bytes: ids and lengths sent to other ranks.
        weight_bytes: gradients that are all-reduced, counted once.
        node_held: of all these, over the rank's link inside its node, as a holder of rows.
        node_home: the same, for the rank's own batch.
        network_held: as a holder of rows, over the link to other nodes.
        network_home: for the rank's own batch, over the link to other nodes.
        memory_bytes: read from and written to the device's memory.
        host_bytes: rows and state from the host's memory to the device; as much goes back meanwhile.
        flops: of W2 and the dense layers.
    """

    vector_bytes: float = 0
    index_bytes: float = 0
    weight_bytes: float = 0
    node_held: float = 0
    node_home: float = 0
    network_held: float = 0
    network_home: float = 0
    memory_bytes: float = 0
    host_bytes: float = 0
    flops: float = 0

    @property
    def sent_bytes(self) -> float:
        return self.vector_bytes + self.index_bytes + self.weight_bytes


def all_reduced(size: float, world_size: int, local_world_size: int) -> Step:
    """An all-reduce of ``size`` bytes.

    It sends 2·(R-1)/R of its bytes over the links of a node; between N nodes, whose ranks share it, 2·(N-1)/N of them
    over a node's network cards.
    """
    if world_size == 1:
        return Step()
    nodes = -(-world_size // local_world_size)
    within = 2 * size * (world_size - 1) / world_size
    between = 2 * size * (nodes - 1) / nodes / local_world_size
    return Step(weight_bytes=size, node_held=within, node_home=within, network_held=between, network_home=between)


def row_state_bytes(optimizer: Optimizer, width: int) -> int:
    """Of one row in fbgemm's kernels and in their dense forms alike; float32 whatever the rows are."""
    return {"sgd": 0, "adagrad": FLOAT * width, "rowwise_adagrad": FLOAT, "adam": 2 * FLOAT * width}[optimizer]


def replicated_bytes(elements: int, optimizer: Optimizer) -> int:
    """Weights, gradients and optimizer state of what every rank holds; rowwise_adagrad is adagrad there."""
    states = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}[optimizer]
    return FLOAT * elements * (2 + states)


def total_memory(parts: Iterable[Memory]) -> Memory:
    """The sum."""
    return sum(parts, Memory())


def total_step(parts: Iterable[Step]) -> Step:
    """The sum."""
    return sum(parts, Step())


def gigabytes(size: float) -> str:
    """In 10^9 bytes, three digits."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


@dataclass(frozen=True)
class Device:
    """One rank's hardware; bytes, bytes a second in one direction, and float32 operations a second.

    Attributes:
        host_memory: a rank's share of its host's; 0 for a CPU, whose ``memory`` that is.
        host_bandwidth: between host and device, one direction.
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
        """Without ``RESERVED_SHARE``."""
        return self.memory * (1 - RESERVED_SHARE)

    @property
    def usable_host_memory(self) -> float:
        """Without ``RESERVED_SHARE``."""
        return self.host_memory * (1 - RESERVED_SHARE)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, one part after another: launches and waiting are not in them."""

    network: float
    memory: float
    host: float
    compute: float

    @property
    def total(self) -> float:
        return self.network + self.memory + self.host + self.compute

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {
            "network": self.network,
            "memory bandwidth": self.memory,
            "host link": self.host,
            "compute": self.compute,
        }
        return max(parts, key=lambda part: parts[part])


def step_time(step: Step, device: Device) -> StepTime:
    """The links inside the node and to other nodes work at the same time, and both ways."""
    node, network = max(step.node_held, step.node_home), max(step.network_held, step.network_home)
    return StepTime(
        network=max(node / device.node_bandwidth, network / device.network_bandwidth),
        memory=step.memory_bytes / device.memory_bandwidth,
        host=step.host_bytes / device.host_bandwidth if step.host_bytes else 0.0,
        compute=step.flops / device.flops,
    )


def milliseconds(time: StepTime) -> str:
    """In words, two digits."""
    found = 1e3 * time.total
    return f"{found:.2g} ms" if found < 100 else f"{found:,.0f} ms"
