"""Suggests settings with which tables fit that do not, the cheapest first, each with its memory and step time."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress

from mlet_dist.embeddings.planning.cost_model import Device, Memory, gigabytes, milliseconds
from mlet_dist.embeddings.planning.plan_cost import fullest_memory, slowest_step
from mlet_dist.errors import UserError
from mlet_dist.planner.configurations import Case, budget_share, even_memory
from mlet_dist.planner.hardware_rates import build_device, precision_of
from mlet_dist.planner.plan_inputs import presets
from mlet_dist.training.model_plan import DoesNotFit

_MAX_NODES = 4096
_BUDGETS = (8, 4, 2, 1, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)  # of compressed tables, as shares
_MAX_PLANS = 3  # tries of one kind of change, if the tables fit by the formulas but the planner finds no plan


def suggestions(case: Case, most: int = 3) -> list[str]:
    """Return up to ``most`` changes with which the planner finds a plan, as short texts."""
    found: list[str] = []
    for change in _CHANGES:
        tried = 0
        for text, changed in _possible(change(case)):
            if not _fits(even_memory(changed), changed.device):
                continue
            tried += 1
            try:
                planned = changed.plan()
            except DoesNotFit:
                if tried == _MAX_PLANS:
                    break
                continue
            except UserError:  # this change is impossible for another reason
                break
            needed = fullest_memory(planned.tables, planned.dense)
            _, time = slowest_step(planned.tables, planned.dense, changed.device)
            host = f" and {gigabytes(needed.host)} of host memory" if needed.host else ""
            found.append(
                f"{text}: {gigabytes(needed.total)} of {gigabytes(changed.device.usable_memory)} per rank{host}, "
                f"{milliseconds(time)} per step"
            )
            break
        if len(found) == most:
            break
    return found


def _possible(changes: Iterator[tuple[str, Case]]) -> Iterator[tuple[str, Case]]:
    """Yield the changes up to the first one that cannot be made."""
    with suppress(UserError):
        yield from changes


def _fits(memory: Memory, device: Device) -> bool:
    return memory.total <= device.usable_memory and memory.host <= device.usable_host_memory


def _any_sharding_type(case: Case) -> Iterator[tuple[str, Case]]:
    """Lift the limits on sharding types."""
    sharding = case.config.sharding
    own = {name: table for name, table in sharding.tables.items() if table.sharding_types is not None}
    keys = ["sharding.sharding_types"] if sharding.sharding_types is not None else []
    keys += [f"sharding.tables.{name}.sharding_types" for name in own]
    if keys:
        free = {name: dataclasses.replace(table, sharding_types=None) for name, table in own.items()}
        freed = case.with_settings("sharding", sharding_types=None, tables=sharding.tables | free)
        yield " ".join(f"{key}=null" for key in keys), freed


def _rowwise_state(case: Case) -> Iterator[tuple[str, Case]]:
    """Use an optimizer with one value of state for each row."""
    if case.config.optimizer.name in ("adagrad", "adam"):
        yield "optimizer.name=rowwise_adagrad", case.with_settings("optimizer", name="rowwise_adagrad")


def _half_rows(case: Case) -> Iterator[tuple[str, Case]]:
    """Store rows in fp16."""
    fused_adam = not case.ranks.on_cpu or case.config.optimizer.name != "adam"
    if case.config.sharding.rows_dtype == "fp32" and fused_adam and not case.spec.row_ranges:
        yield "sharding.rows_dtype=fp16", case.with_settings("sharding", rows_dtype="fp16")


def _host_rows(case: Case) -> Iterator[tuple[str, Case]]:
    """Store rows in host memory where device memory cannot hold them."""
    if not case.ranks.on_cpu and case.config.sharding.compute_kernels == ("fused",):
        kernels = ("fused", "fused_uvm" if case.spec.adaptive else "fused_uvm_caching")
        text = f"sharding.compute_kernels=[{','.join(kernels)}]"
        yield text, case.with_settings("sharding", compute_kernels=kernels)


def _smaller_budget(case: Case) -> Iterator[tuple[str, Case]]:
    """Use a smaller budget of compressed tables, the largest first."""
    if case.spec.row_ranges:
        own = budget_share(case)
        for share in _BUDGETS:
            if share < own:
                yield f"compression.budget={share:g}", case.with_settings("compression", budget=share)


def _smaller_k(case: Case) -> Iterator[tuple[str, Case]]:
    """Use fewer columns of W1, the largest number first."""
    if case.spec.row_ranges:
        return
    k, d = case.spec.model.hidden_dim, max(case.spec.embedding_dims.values())
    for smaller in range((k or d) - 4, d - 1, -4):
        yield f"model.hidden_dim={smaller}", case.with_settings("model", hidden_dim=smaller)


def _more_ranks(case: Case) -> Iterator[tuple[str, Case]]:
    """Use more nodes, the smallest number first."""
    local = case.ranks.local_world_size
    for nodes in range(case.ranks.world_size // local + 1, _MAX_NODES + 1):
        if case.config.data.batch_size % (nodes * local) == 0:
            yield f"--world-size {nodes * local}", case.with_ranks(nodes * local)


def _smaller_batch(case: Case) -> Iterator[tuple[str, Case]]:
    """Halve the batch again and again."""
    batch = case.config.data.batch_size // 2
    while batch >= case.ranks.world_size and batch % case.ranks.world_size == 0:
        yield f"data.batch_size={batch}", case.with_settings("data", batch_size=batch)
        batch //= 2


def _larger_device(case: Case) -> Iterator[tuple[str, Case]]:
    """Use a device with more memory, the smallest one first."""
    devices = [build_device(each, precision_of(case.config)) for each in presets().values()]
    larger = [device for device in devices if device.kind == case.device.kind]
    for device in sorted(larger, key=lambda each: each.memory):
        if device.memory > case.device.memory:
            yield f"--device {device.name}", dataclasses.replace(case, device=device)


# The cheapest first: changes that need neither hardware nor a smaller model, then a smaller model, then hardware.
_CHANGES: tuple[Callable[[Case], Iterator[tuple[str, Case]]], ...] = (
    _any_sharding_type,
    _rowwise_state,
    _half_rows,
    _host_rows,
    _smaller_budget,
    _smaller_k,
    _more_ranks,
    _smaller_batch,
    _larger_device,
)
