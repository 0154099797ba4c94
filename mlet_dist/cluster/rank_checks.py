"""`mlet doctor --distributed`: every rank of a job reports what it sees, and the reports are compared."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.cluster.calibration import calibrate
from mlet_dist.cluster.preflight import Report, collect_report, find_problems
from mlet_dist.cluster.software_checks import Check
from mlet_dist.config.calibration_file import write_calibration
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError
from mlet_dist.training.process_group import Worker, join_ranks

_TIMEOUT = timedelta(seconds=30)
_ALL_REDUCE_BYTES = 16 << 20
_MOST_HOSTS_SHOWN = 8


def check_ranks(load: Callable[[], Config] | None, calibration: Path | None = None) -> dict[str, Any]:
    """Check the ranks that torchrun's environment describes. A collective call, which ends within three minutes.

    Args:
        load: loads and checks the config of the job; None to check the ranks alone.
        calibration: a file that the first rank writes with the rates of the ranks; None measures an all-reduce alone.

    Returns:
        ``ok``, ``checks`` (each ``Check`` as a dict) and ``wrong`` (lines); the same on every rank.

    Raises:
        UserError: the calibration file cannot be written; raised on the first rank.
        RanksLost: ranks did not join, or did not take part in a collective.
    """
    config, problem = None, ""
    try:
        config = load() if load is not None else None
    except UserError as error:
        problem = str(error)
    device = "auto" if config is None else config.train.device
    device = "cpu" if device == "cuda" and not torch.cuda.is_available() else device
    with join_ranks(device, _TIMEOUT, _TIMEOUT) as worker:
        if config is not None and config.train.device == "cuda" and worker.device.type != "cuda":
            problem = "train.device is cuda, but torch finds no CUDA device; use cpu or auto"
        on_cuda = worker.device.type == "cuda" and worker.local_world_size > 1
        first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        with collect_report(f"rank {worker.rank}", config, problem, on_cuda, first_of_node) as report:
            reports = _gather(report | {"host": socket.gethostname()}, worker)
            wrong = _broadcast(find_problems(reports) if worker.is_first else [])
        checks = [_check_hosts(reports), _check_variables(reports, worker), _time_all_reduce(worker)]
        if calibration is not None and not wrong:
            checks.append(_calibrate(worker, calibration))
    checks += [Check("wrong", "fail", line) for line in wrong] or [_describe_storage(config)]
    return {"ok": not wrong, "checks": [asdict(check) for check in checks], "wrong": wrong}


def _gather(report: Report, worker: Worker) -> list[Report]:
    reports: list[Any] = [None] * worker.world_size
    dist.all_gather_object(reports, report, group=dist.new_group(backend="gloo", timeout=_TIMEOUT))
    return reports


def _broadcast(lines: list[str]) -> list[str]:
    objects = [lines]
    dist.broadcast_object_list(objects, src=0, group=dist.new_group(backend="gloo", timeout=_TIMEOUT))
    return objects[0]


def _check_hosts(reports: Sequence[Report]) -> Check:
    hosts = Counter(report["host"] for report in reports)
    versions = " ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())
    listed = ", ".join(f"{host} ({count})" for host, count in list(hosts.items())[:_MOST_HOSTS_SHOWN])
    more = f" and {len(hosts) - _MOST_HOSTS_SHOWN} more hosts" if len(hosts) > _MOST_HOSTS_SHOWN else ""
    return Check("ranks", "ok", f"{len(reports)} on {listed}{more}; {versions}")


def _check_variables(reports: Sequence[Report], worker: Worker) -> Check:
    shown = " ".join(f"{name}={value}" for name, value in reports[0]["environment"].items())
    found = f"{dist.get_backend()} on {worker.device.type}; {shown or 'no variable of gloo or NCCL is set'}"
    names = {name for report in reports for name in report["environment"]} - {"MASTER_ADDR", "CUDA_VISIBLE_DEVICES"}
    differing = [name for name in sorted(names) if len({report["environment"].get(name) for report in reports}) > 1]
    if differing:
        advice = f"{', '.join(differing)}: not the same on all ranks; check that this is intended"
        return Check("settings", "warn", found, advice)
    return Check("settings", "ok", found)


def _time_all_reduce(worker: Worker) -> Check:
    tensor = torch.ones(_ALL_REDUCE_BYTES // 4, device=worker.device)
    times = []
    for _ in range(4):  # the first one also opens the connections
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        times.append(time.perf_counter() - started)
    best = min(times[1:])
    sent = 2 * (worker.world_size - 1) / worker.world_size * _ALL_REDUCE_BYTES
    found = (
        f"{_ALL_REDUCE_BYTES >> 20} MiB over {worker.world_size} ranks in {1e3 * best:.1f} ms, "
        f"{sent / best / 1e9:.2f} GB/s a rank"
    )
    return Check("all-reduce", "ok", found)


def _calibrate(worker: Worker, path: Path) -> Check:
    found = calibrate(worker)
    if worker.is_first:
        write_calibration(path, found)
    largest = [group for group in found.groups if group.ranks == worker.world_size]
    times = [f"{group.collective} {group.latency_us:,.0f} us" for group in largest]
    shown = "; ".join(times or ["one rank has no collectives"])
    rates = (
        f"memory {found.memory_bandwidth_gbs:.3g} GB/s, products {1e3 * found.tflops:.3g} GFLOPS, host "
        f"{found.host_step_us / 1e3:.3g} ms a step and {found.host_table_us:.3g} us a table"
    )
    return Check("rates", "ok", f"{shown}; {rates}; written to {path}")


def _describe_storage(config: Config | None) -> Check:
    if config is None:
        return Check("storage", "ok", "not checked: no config was given")
    places = (
        config.run.dir if config.train.checkpoint_dir is None else f"{config.run.dir}, {config.train.checkpoint_dir}"
    )
    return Check("storage", "ok", f"{config.data.path} can be read; {places}: writable, and shared by all nodes")
