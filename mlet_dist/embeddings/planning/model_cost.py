"""What all tables and the dense layers cost a rank together."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlet_dist.embeddings.planning.cost_model import (
    FLOAT,
    RESERVED_SHARE,
    Memory,
    Optimizer,
    Step,
    all_reduced,
    gigabytes,
    replicated_bytes,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.planning.step_time import Device, StepTime, step_time
from mlet_dist.embeddings.planning.table_cost import TableCost

Tables = Mapping[str, tuple[TableCost, Sequence[int]]]
"""Each table's cost and its rows by rank."""


@dataclass(frozen=True)
class DenseCost:
    """The layers that every rank holds beside the tables.

    Args:
        parameters: numbers in them.
        widths: outputs of each layer.
        features: vectors that interact, the dense one included.
        embedding_dim: d.
        local_batch_size: b.
        optimizer: of the run.
        world_size: R.
        local_world_size: L.
    """

    parameters: int
    widths: tuple[int, ...]
    features: int
    embedding_dim: int
    local_batch_size: int
    optimizer: Optimizer
    world_size: int
    local_world_size: int

    def memory(self, table_buffers: float = 0) -> Memory:
        """Weights, gradients and state; and activations beyond the tables' buffers.

        Args:
            table_buffers: bytes of all tables' buffers, half of which, the gradients, are free while activations are
                at their peak.
        """
        buffers = max(0, self.activation_bytes() - table_buffers / 2)
        return Memory(dense=replicated_bytes(self.parameters, self.optimizer), buffers=buffers)

    def activation_bytes(self) -> float:
        """Outputs of the layers, the gradient of the widest, the vectors that interact and their products."""
        layers = sum(self.widths) + max(self.widths)
        interaction = 2 * self.features * self.embedding_dim + 2 * self.features**2
        return FLOAT * self.local_batch_size * (layers + interaction)

    def step(self) -> Step:
        """Matrix products and the interaction; every weight is read thrice and updated."""
        flops = 6 * self.local_batch_size * (self.parameters + self.features**2 * self.embedding_dim)
        moved = 3 * self.activation_bytes() + 8 * FLOAT * self.parameters
        reduced = all_reduced(FLOAT * self.parameters, self.world_size, self.local_world_size)
        return reduced + Step(memory_bytes=moved, flops=flops)


def memory_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Memory:
    """Everything that one rank holds."""
    held = total_memory(cost.memory(rows[rank]) for cost, rows in tables.values())
    return held + dense.memory(held.buffers)


def step_of_rank(tables: Tables, dense: DenseCost, rank: int) -> Step:
    """Everything that one rank does in a step."""
    return total_step([*(cost.step(holds=_holds(cost, rows[rank])) for cost, rows in tables.values()), dense.step()])


def slowest_step(tables: Tables, dense: DenseCost, device: Device) -> tuple[Step, StepTime]:
    """The step of the rank that takes longest."""
    steps = [step_of_rank(tables, dense, rank) for rank, *_ in alike(tables)]
    return max(((step, step_time(step, device)) for step in steps), key=lambda each: each[1].total)


def fullest_memory(tables: Tables, dense: DenseCost) -> Memory:
    """That of the rank whose device holds most; ``host`` is the most that any rank's host holds."""
    memories = [memory_of_rank(tables, dense, rank) for rank, *_ in alike(tables)]
    fullest = max(memories, key=lambda each: each.total)
    return dataclasses.replace(fullest, host=max(each.host for each in memories))


def shortage(tables: Tables, dense: DenseCost, memory: float, host_memory: float = 0) -> str:
    """Which table, on which rank, and how many bytes are missing there, on the device or else on the host."""
    memories = {rank: memory_of_rank(tables, dense, rank) for rank, *_ in alike(tables)}
    rank = max(memories, key=lambda each: memories[each].total)
    needed, given, where = memories[rank].total, memory, ""
    if needed <= given * (1 - RESERVED_SHARE):
        host_rank = max(memories, key=lambda each: memories[each].host)
        if memories[host_rank].host > host_memory * (1 - RESERVED_SHARE):
            rank, needed, given, where = host_rank, memories[host_rank].host, host_memory, " of its host"
    usable = given * (1 - RESERVED_SHARE)

    def of_table(name: str) -> float:
        cost, rows = tables[name]
        held = cost.memory(rows[rank])
        return held.host if where else held.total

    name = max(tables, key=of_table)
    cost, rows = tables[name]
    return (
        f"rank {rank} needs {gigabytes(needed)}{where} of the {gigabytes(usable)} that are left of "
        f"{gigabytes(given)}, {gigabytes(needed - usable)} short; the largest there is table {name!r}: "
        f"{rows[rank]:,} rows of {cost.row_width}, {gigabytes(of_table(name))}"
    )


def _holds(cost: TableCost, rows: int) -> bool:
    return rows > 0 or cost.holders == cost.world_size


def alike(tables: Tables) -> list[list[int]]:
    """Ranks that hold the same numbers of rows, together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, held in enumerate(zip(*(rows for _, rows in tables.values()), strict=True)):
        found.setdefault(held, []).append(rank)
    return list(found.values())
