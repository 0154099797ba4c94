"""Measures collectives of a job's ranks: their latency and bandwidth, in groups of several sizes."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import distributed as dist

from mlet_dist.embeddings.planning.collective_time import COLLECTIVES, Collective, MeasuredGroup
from mlet_dist.training.process_group import Worker

_SMALL = 8  # bytes that a rank sends to each other
_LARGE = {"cpu": (1 << 18, 1 << 21), "cuda": (1 << 22, 1 << 25)}  # bytes of a rank
_REPEATS, _LARGE_REPEATS = 20, 4
_MAX_RANKS_FOR_PAIRS = 64  # with more ranks, creating all groups of two takes too long


def group_sizes(world_size: int, local_world_size: int) -> list[int]:
    """Return the sizes of groups to measure: those of process groups that training has, and sizes in between."""
    sizes = {min(local_world_size, world_size), world_size}
    if world_size <= _MAX_RANKS_FOR_PAIRS:
        sizes.add(2)
    if world_size % 2 == 0:
        sizes.add(world_size // 2)
    return sorted(size for size in sizes if size > 1 and world_size % size == 0)


def measure_collectives(worker: Worker) -> list[MeasuredGroup]:
    """Measure every collective in groups of consecutive ranks, all of which work at once. A collective call.

    Returns:
        The medians over all ranks, the same on every rank.
    """
    found = []
    for size in group_sizes(worker.world_size, worker.local_world_size):
        members = [list(range(first, first + size)) for first in range(0, worker.world_size, size)]
        groups = [dist.new_group(ranks, timeout=worker.timeout) for ranks in members]
        group = groups[worker.rank // size]
        for collective in COLLECTIVES:
            times = [_seconds(collective, group, size, _SMALL * size, worker, _REPEATS)]
            for sent in _LARGE[worker.device.type]:
                times.append(_seconds(collective, group, size, sent, worker, _LARGE_REPEATS))
            latency, *large = median_of_ranks(times, worker)
            crossing = _sent_share(collective, size)
            sizes = _LARGE[worker.device.type]
            # The slope between the two large messages, unless noise makes it negative.
            slope = (large[1] - large[0]) / (crossing * (sizes[1] - sizes[0]))
            slope = max(slope, 0.2 * max(large[1] - latency, 1e-9) / (crossing * sizes[1]))
            nodes = -(-size // worker.local_world_size)
            found.append(MeasuredGroup(collective, size, nodes, latency, 1 / slope))
        for each in groups:
            if each is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(each)
    return found


def median_of_ranks(values: list[float], worker: Worker) -> list[float]:
    """Return the median of each value over all ranks. A collective call."""
    own = torch.tensor(values, dtype=torch.float64, device=worker.device)
    gathered = [torch.empty_like(own) for _ in range(worker.world_size)]
    dist.all_gather(gathered, own)
    return torch.stack(gathered).median(dim=0).values.tolist()


def _sent_share(collective: Collective, ranks: int) -> float:
    """Return the bytes that a rank sends of each byte of its tensor."""
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks


def _seconds(
    collective: Collective, group: dist.ProcessGroup, ranks: int, size: int, worker: Worker, repeats: int
) -> float:
    """Return the median seconds of one collective of ``size`` bytes, after one that opens the connections."""
    call = _call(collective, group, ranks, size, worker.device)
    call()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        synchronize(worker.device)
        started = time.perf_counter()
        call()
        synchronize(worker.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _call(
    collective: Collective, group: dist.ProcessGroup, ranks: int, size: int, device: torch.device
) -> Callable[[], object]:
    count = -(-size // (4 * ranks)) * ranks
    whole, part = torch.zeros(count, device=device), torch.zeros(count // ranks, device=device)
    if collective == "all_to_all":
        received = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(received, whole, group=group)
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if collective == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    return lambda: dist.all_gather_into_tensor(whole, part, group=group)


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
