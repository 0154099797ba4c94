"""`mlet doctor --distributed --calibrate`: measures the rates of a job's ranks for `mlet plan --calibration`."""

import socket
from datetime import UTC, datetime
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.cluster.collective_rates import measure_collectives
from mlet_dist.cluster.device_rates import measure_device
from mlet_dist.cluster.host_rates import FEW_TABLES, MANY_TABLES, measure_host
from mlet_dist.cluster.software_checks import installed_versions
from mlet_dist.config.calibration_file import BACKENDS, Calibration, GroupRates
from mlet_dist.embeddings.planning.collective_time import CollectiveTimes, MeasuredGroup
from mlet_dist.embeddings.planning.step_collectives import latency
from mlet_dist.training.process_group import Worker


def calibrate(worker: Worker) -> Calibration:
    """Measure collectives, devices and the host, on all ranks at once. A collective call of some ten seconds."""
    groups = measure_collectives(worker)
    memory, flops, ids, launch = measure_device(worker)
    few, many = measure_host(worker)
    waiting = _waiting(groups, worker)
    of_table = max(0.0, (many - few) / (MANY_TABLES - FEW_TABLES))
    hosts: list[Any] = [None] * worker.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    kind = worker.device.type
    return Calibration(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=kind,
        backend=BACKENDS[kind],
        hosts=tuple(dict.fromkeys(hosts)),
        versions={name: version for name, version in installed_versions().items() if version},
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        threads=torch.get_num_threads(),
        memory_bandwidth_gbs=_rounded(memory / 1e9),
        tflops=_rounded(flops / 1e12),
        million_ids_per_s=_rounded(ids / 1e6),
        launch_us=_rounded(launch * 1e6),
        host_step_us=_rounded(1e6 * max(0.0, few - FEW_TABLES * of_table - waiting)),
        host_table_us=_rounded(1e6 * of_table),
        groups=tuple(
            GroupRates(
                group.collective,
                group.ranks,
                group.nodes,
                latency_us=_rounded(group.latency * 1e6),
                gbs=_rounded(group.bandwidth / 1e9),
            )
            for group in groups
        ),
    )


def _waiting(groups: list[MeasuredGroup], worker: Worker) -> float:
    """Return the part of a tiny step that the plan counts as latency, so that it is not counted twice.

    On CUDA the device waits for it while the host goes on.
    """
    if worker.device.type == "cuda":
        return 0.0
    times = CollectiveTimes("gloo", tuple(groups))
    return latency([("row_wise", "unique_rows", False)], worker.world_size, worker.local_world_size, times)


def _rounded(value: float) -> float:
    """Return a value with five digits, which is more than a measurement has."""
    return float(f"{value:.5g}")
