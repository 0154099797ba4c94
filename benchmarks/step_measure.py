"""Measures one case of benchmarks/step.py: the models take turns, and ratios are those of one round."""

import statistics
import time
from collections.abc import Generator
from itertools import islice
from typing import Any

import torch
from step_arms import ARMS
from step_cases import Case, Sizes, batches_of, spec_of
from step_counters import count_step_operations
from step_floor import floor, synchronize
from torch import distributed as dist
from traffic import count_traffic

from mlet_dist.training.process_group import Worker

RATIOS = {
    "single_over_plain": ("single", "plain_single"),
    "mlet_single_over_plain": ("mlet_single", "plain_single"),
    "mlet_over_plain_mlet": ("mlet", "plain_mlet"),
    "mlet_over_single": ("mlet", "single"),
    "mlet_over_mlet_single": ("mlet", "mlet_single"),
    "mlet_over_single_planned": ("mlet", "single_planned"),
    "composed_over_mlet": ("composed", "mlet"),
}
_NOT_TIMED = 2  # the first steps of a round find the caches filled by other models
_FEWEST_ROUNDS = 3
_ROWS_A_ROUND = 1280


def measure(case: Case, sizes: Sizes, worker: Worker, seconds: float, steps: int | None) -> dict[str, Any]:
    """Run the models of a case in turn for about ``seconds``, and return its figures."""
    batches = batches_of(case, sizes, worker.rank)
    runs = {name: arm(case, sizes, batches, worker) for name, arm in ARMS.items()}
    operations, sent = {}, {}
    for name, run in runs.items():
        for _ in islice(run, _NOT_TIMED):  # creates what is created lazily
            pass
        with count_step_operations() as counts:
            next(run)
        operations[name] = {
            "collectives": counts.collectives,
            "host_synchronisations": counts.host_synchronisations,
        }
        with count_traffic() as traffic:
            next(run)
        sent[name] = traffic.vector_bytes
    wall, cpu = _times(runs, worker, seconds, steps or max(1, _ROWS_A_ROUND // case.batch_size))
    for run in runs.values():
        run.close()
    product = operations["mlet"]
    return {
        **vars(case),
        "case": case.name,
        "ids_from": "data set" if case.ids == "real" and sizes.data is not None else "made",
        "device": worker.device.type,
        "threads": torch.get_num_threads(),
        "rounds": len(wall["mlet"]),
        "ms": {name: statistics.median(times) for name, times in wall.items()},
        "quartiles_ms": {name: _quartiles(times) for name, times in wall.items()},
        "cpu_ms": {name: statistics.median(times) for name, times in cpu.items()},
        **{ratio: _paired(wall, *names) for ratio, names in RATIOS.items()},
        "quartiles": {ratio: _quartiles(_pairs(wall, *names)) for ratio, names in RATIOS.items()},
        "cpu_ratios": {ratio: _paired(cpu, *names) for ratio, names in RATIOS.items()},
        "collectives_per_step": sum(product["collectives"].values()),
        "host_synchronisations_per_step": product["host_synchronisations"],
        "operations": operations,
        "vector_bytes": sent,
        "floor": floor(
            spec_of(case, sizes, single_layer=False), batches[0], worker, adagrad=case.optimizer == "adagrad"
        ),
    }


def _times(
    runs: dict[str, Generator[None, None, None]], worker: Worker, seconds: float, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return milliseconds of a step by model and round: wall time, and this process's processor time."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    goes_on = True
    while goes_on:
        forward = len(wall["mlet"]) % 2
        for name in list(runs)[:: 1 if forward else -1]:
            dist.barrier()
            for _ in islice(runs[name], min(_NOT_TIMED, steps)):
                pass
            synchronize(worker.device)
            before, cpu_before = time.perf_counter(), time.process_time()
            for _ in islice(runs[name], steps):
                pass
            synchronize(worker.device)
            wall[name].append((time.perf_counter() - before) / steps * 1e3)
            cpu[name].append((time.process_time() - cpu_before) / steps * 1e3)
        is_time_left = time.perf_counter() - started < seconds or len(wall["mlet"]) < _FEWEST_ROUNDS
        decision = torch.tensor([int(is_time_left)], device=worker.device)
        dist.broadcast(decision, 0)
        goes_on = bool(decision.item())
    return wall, cpu


def _pairs(times: dict[str, list[float]], numerator: str, denominator: str) -> list[float]:
    return [above / below for above, below in zip(times[numerator], times[denominator], strict=True)]


def _paired(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    return statistics.median(_pairs(times, numerator, denominator))


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")[::2]
