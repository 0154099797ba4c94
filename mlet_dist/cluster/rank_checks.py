"""`mlet doctor --distributed`: every rank of a job looks at itself, and all of them at one another."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.cluster.preflight import Facts, facts_of, judge
from mlet_dist.cluster.software_checks import Check
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.training.process_group import Worker, join_ranks

_PATIENCE = timedelta(seconds=30)
_BYTES = 16 << 20


def examine(load: Callable[[], Config] | None) -> dict[str, Any]:
    """What the ranks of torchrun's environment find; a collective call, which ends within two minutes.

    Args:
        load: reads and checks what the job will be told; None where only the ranks themselves are of interest.

    Returns:
        ``ok``, ``checks`` (each ``Check`` as a dict), ``wrong`` (lines); the same on every rank.

    Raises:
        RanksLost: ranks did not come, or take no part.
    """
    config, problem = None, ""
    try:
        config = load() if load is not None else None
    except UserError as error:
        problem = str(error)
    device = "auto" if config is None else config.train.device
    device = "cpu" if device == "cuda" and not torch.cuda.is_available() else device
    with join_ranks(device, _PATIENCE, _PATIENCE) as worker:
        if config is not None and config.train.device == "cuda" and worker.device.type != "cuda":
            problem = "train.device is cuda, but torch finds no CUDA device"
        on_cuda = worker.device.type == "cuda" and worker.local_world_size > 1
        first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        with facts_of(f"rank {worker.rank}", config, problem, on_cuda, first_of_node) as facts:
            told = _gather(facts | {"host": socket.gethostname()}, worker)
            wrong = _from_first(judge(told) if worker.is_first else [])
        checks = [_ranks(told), _settings(told, worker), _all_reduce(worker)]
    checks += [Check("wrong", "fail", line) for line in wrong] or [_storage(config)]
    return {"ok": not wrong, "checks": [asdict(check) for check in checks], "wrong": wrong}


def _gather(facts: Facts, worker: Worker) -> list[Facts]:
    told: list[Any] = [None] * worker.world_size
    dist.all_gather_object(told, facts, group=dist.new_group(backend="gloo", timeout=_PATIENCE))
    return told


def _from_first(lines: list[str]) -> list[str]:
    box = [lines]
    dist.broadcast_object_list(box, src=0, group=dist.new_group(backend="gloo", timeout=_PATIENCE))
    return box[0]


def _ranks(told: Sequence[Facts]) -> Check:
    hosts = Counter(facts["host"] for facts in told)
    versions = " ".join(f"{name} {version}" for name, version in told[0]["versions"].items())
    listed = ", ".join(f"{host} ({count})" for host, count in list(hosts.items())[:8])
    more = f" and {len(hosts) - 8} hosts more" if len(hosts) > 8 else ""
    return Check("ranks", "ok", f"{len(told)} on {listed}{more}; {versions}")


def _settings(told: Sequence[Facts], worker: Worker) -> Check:
    shown = " ".join(f"{name}={value}" for name, value in told[0]["environment"].items())
    found = f"{dist.get_backend()} on {worker.device.type}; {shown or 'no variable of gloo or NCCL is set'}"
    names = {name for facts in told for name in facts["environment"]} - {"MASTER_ADDR", "CUDA_VISIBLE_DEVICES"}
    apart = [name for name in sorted(names) if len({facts["environment"].get(name) for facts in told}) > 1]
    if apart:
        return Check("settings", "warn", found, f"{', '.join(apart)}: not the same on all ranks; is that meant so?")
    return Check("settings", "ok", found)


def _all_reduce(worker: Worker) -> Check:
    tensor = torch.ones(_BYTES // 4, device=worker.device)
    times = []
    for _ in range(4):  # connections are made in the first
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        times.append(time.perf_counter() - started)
    best = min(times[1:])
    sent = 2 * (worker.world_size - 1) / worker.world_size * _BYTES
    found = (
        f"{_BYTES >> 20} MiB over {worker.world_size} ranks in {1e3 * best:.1f} ms, {sent / best / 1e9:.2f} GB/s a rank"
    )
    return Check("all-reduce", "ok", found)


def _storage(config: Config | None) -> Check:
    if config is None:
        return Check("storage", "ok", "not looked at: no config was named")
    places = (
        config.run.dir if config.train.checkpoint_dir is None else f"{config.run.dir}, {config.train.checkpoint_dir}"
    )
    return Check("storage", "ok", f"{config.data.path} can be read; {places}: writable, and one for all nodes")
