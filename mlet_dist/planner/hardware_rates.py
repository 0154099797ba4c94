"""The rates of a rank for a plan: of a preset or a file of hardware, or measured on a cluster (``--calibration``)."""

import dataclasses
from typing import Any

from mlet_dist.config.calibration_file import Calibration
from mlet_dist.config.config_file import Config
from mlet_dist.embeddings.planning.collective_time import CollectiveTimes, MeasuredGroup
from mlet_dist.embeddings.planning.cost_model import HOST_OPERATIONS, TABLE_OPERATIONS, Device, device_defaults
from mlet_dist.planner.plan_inputs import PRECISIONS, Hardware


def build_device(hardware: Hardware, precision: str = "fp32", calibration: Calibration | None = None) -> Device:
    """Return the hardware of a rank.

    Args:
        hardware: of a preset or a file.
        precision: fp32, tf32 or bf16, of matrix products.
        calibration: measured rates, which take the place of those of ``hardware``; the memory stays.
    """
    values: dict[str, Any] = device_defaults(hardware["kind"]) | hardware
    rates = {name: values.pop(key, values["flops"]) for name, key in PRECISIONS.items()}
    if "launch" in hardware:
        values |= {"host_step": HOST_OPERATIONS * values["launch"], "host_table": TABLE_OPERATIONS * values["launch"]}
    faster = rates.get(precision, values["flops"]) / values["flops"]
    device = Device(**values)
    if calibration is not None:
        device = _calibrated(device, calibration)
    return dataclasses.replace(device, flops=device.flops * faster)


def precision_of(config: Config) -> str:
    """Return the precision of a run's matrix products."""
    return config.train.precision


def rate_sources(hardware: Hardware, calibration: Calibration | None, world_size: int, nodes: int) -> list[str]:
    """Return lines that say where the numbers of a plan come from."""
    if calibration is None:
        return [
            f"bandwidths and operations are peak rates of {hardware['name']}, which no run reaches",
            "latencies and the host's work are estimates for its backend; `mlet doctor --distributed --calibrate FILE` "
            "measures them",
        ]
    found = calibration
    hosts = found.hosts[0] if len(found.hosts) == 1 else f"{found.hosts[0]} and {len(found.hosts) - 1} more"
    lines = [
        f"rates were measured on {found.date[:10]} by {found.world_size:,} ranks of {hosts} over {found.backend}; "
        f"memory is that of {hardware['name']}"
    ]
    if found.world_size == 1:
        lines.append("one rank measured no collectives: links are those of the preset, latencies are estimates")
    elif found.world_size != world_size:
        lines.append(
            f"latencies of {world_size:,} ranks follow from measured groups by the growth of the backend's algorithm"
        )
    if nodes > 1 and 1 < found.world_size == found.local_world_size:
        lines.append(f"the network between nodes was not measured: its bandwidth is that of {hardware['name']}")
    return lines


def _calibrated(device: Device, found: Calibration) -> Device:
    measured = tuple(
        MeasuredGroup(each.collective, each.ranks, each.nodes, each.latency_us / 1e6, each.gbs * 1e9)  # type: ignore[arg-type]
        for each in found.groups
    )
    times = CollectiveTimes(device.collectives.backend, measured)
    largest = max((group.ranks for group in measured), default=0)
    rates = {group.collective: group.bandwidth for group in measured if group.ranks == largest}
    inside = [group for group in measured if group.collective == "all_to_all" and group.nodes == 1]
    between = [group for group in measured if group.collective == "all_to_all" and group.nodes > 1]
    of_node = max(inside, key=lambda group: group.ranks, default=None)
    of_network = max(between, key=lambda group: group.ranks, default=None)
    return dataclasses.replace(
        device,
        memory_bandwidth=found.memory_bandwidth_gbs * 1e9,
        flops=found.tflops * 1e12,
        ids=found.million_ids_per_s * 1e6,
        launch=found.launch_us / 1e6,
        host_step=found.host_step_us / 1e6,
        host_table=found.host_table_us / 1e6,
        collectives=times,
        node_bandwidth=device.node_bandwidth if of_node is None else of_node.bandwidth,
        network_bandwidth=device.network_bandwidth if of_network is None else _of_link(of_network, device),
        reduce_rate=rates["all_reduce"] / rates["all_to_all"] if rates else 1.0,
        at_peak=False,
    )


def _of_link(group: MeasuredGroup, device: Device) -> float:
    """Return the bytes per second between nodes: an all-to-all sends the rest inside the node at the same time."""
    inside = (group.ranks // group.nodes - 1) / (group.ranks - 1)
    return group.bandwidth * (1 - inside)
