"""How long a step takes at the hardware's peak rates."""

from dataclasses import dataclass
from typing import Literal

from mlet_dist.embeddings.planning.cost_model import RESERVED_SHARE, Step


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
