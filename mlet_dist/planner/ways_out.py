"""What to change when tables do not fit, cheapest first, each with the memory that it then takes."""

import dataclasses
from collections.abc import Callable, Iterator

from mlet_dist.embeddings.costs import DenseCost, Device, Memory, gigabytes
from mlet_dist.planner.estimate import Case, fullest_rank
from mlet_dist.planner.hardware import presets

_MOST_NODES = 4096


def ways_out(case: Case, most: int = 3) -> list[str]:
    """Up to ``most`` settings with which the tables fit, a few words each; cheap ones, and then more hardware."""
    dense = case.dense()
    found: list[str] = []
    for way in _WAYS:
        for text, changed in way(case):
            memory = _needed(changed, case, dense)
            if memory.total <= changed.device.usable_memory:
                found.append(f"{text}: {gigabytes(memory.total)} of {gigabytes(changed.device.usable_memory)} a rank")
                break
        if len(found) == most:
            break
    return found


def _rowwise_state(case: Case) -> Iterator[tuple[str, Case]]:
    if case.optimizer in ("adagrad", "adam"):
        yield "optimizer.name=rowwise_adagrad", dataclasses.replace(case, optimizer="rowwise_adagrad")


def _smaller_batch(case: Case) -> Iterator[tuple[str, Case]]:
    batch = case.batch_size // 2
    while batch >= case.world_size and batch % case.world_size == 0:
        yield f"data.batch_size={batch}", dataclasses.replace(case, batch_size=batch)
        batch //= 2


def _smaller_k(case: Case) -> Iterator[tuple[str, Case]]:
    k, d = case.spec.model.hidden_dim, case.spec.model.embedding_dim
    for smaller in range((k or d) - 4, d - 1, -4):
        yield f"model.hidden_dim={smaller}", case.with_model(hidden_dim=smaller)


def _more_ranks(case: Case) -> Iterator[tuple[str, Case]]:
    for nodes in range(case.world_size // case.local_world_size + 1, _MOST_NODES + 1):
        ranks = nodes * case.local_world_size
        if case.batch_size % ranks == 0:
            yield f"--world-size {ranks}", dataclasses.replace(case, world_size=ranks)


def _larger_device(case: Case) -> Iterator[tuple[str, Case]]:
    devices = [Device(**each) for each in presets().values()]
    larger = [device for device in devices if device.kind == case.device.kind]
    for device in sorted(larger, key=lambda each: each.memory):
        if device.memory > case.device.memory:
            yield f"--device {device.name}", dataclasses.replace(case, device=device)


# Cheapest first: settings that change little, settings that change the model, hardware. Host memory and rows of fewer
# bytes come behind the optimizer's state.
_WAYS: tuple[Callable[[Case], Iterator[tuple[str, Case]]], ...] = (
    _rowwise_state,
    _smaller_batch,
    _smaller_k,
    _more_ranks,
    _larger_device,
)


def _needed(changed: Case, case: Case, dense: DenseCost) -> Memory:
    adjusted = dataclasses.replace(
        dense,
        local_batch_size=changed.local_batch_size,
        optimizer=changed.optimizer,
        world_size=changed.world_size,
    )
    return fullest_rank(changed, adjusted)
