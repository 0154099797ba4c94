"""The cost of what every rank has beside the tables: the dense layers, and on a CPU the process."""

from dataclasses import dataclass

from mlet_dist.embeddings.planning.cost_model import (
    FLOAT,
    Memory,
    Optimizer,
    Step,
    all_reduce_step,
    replicated_bytes,
)

PROCESS_BYTES = 85e6
"""Bytes of host memory that a training process takes beside tensors, beyond Python with its imports: pages of libraries
that it first uses, readers of data and their threads, collectives; measured (``benchmarks/results``)."""


@dataclass(frozen=True)
class DenseCost:
    """The cost of the replicated layers of a model: all but its tables.

    Args:
        parameters: the number of elements of their weights.
        row_flops: floating-point operations of forward for one row; a step has three times as many.
        row_activations: float32 values of one row that a step holds at their peak, with their gradients.
        row_traffic: float32 values of one row that the operations of a step read and write.
        local_batch_size: b.
        optimizer: the optimizer of the layers.
        world_size: R.
        local_world_size: L.
        on_cpu: whether the layers compute on a CPU.
        note: why the operations and values are only estimated; None if they are measured.
    """

    parameters: int
    row_flops: float
    row_activations: float
    row_traffic: float
    local_batch_size: int
    optimizer: Optimizer
    world_size: int
    local_world_size: int
    on_cpu: bool = False
    note: str | None = None

    def memory(self, table_gradients: float = 0) -> Memory:
        """Return the memory of weights, gradients, optimizer state, and activations beyond the tables' buffers.

        On a CPU it includes that of the process: ``PROCESS_BYTES``, and the activations that share no memory with the
        tables' buffers.

        Args:
            table_gradients: bytes of all tables' buffers that are free when the activations are at their peak
                (``Memory.gradients``).
        """
        activations = self.activation_bytes()
        buffers = max(0, activations - table_gradients)
        # The C library keeps the memory of freed activations, most of which have less than the 32 MiB from which it
        # maps blocks of their own, and the next large tensor gets other memory.
        process = PROCESS_BYTES + activations - buffers if self.on_cpu else 0
        return Memory(dense=replicated_bytes(self.parameters, self.optimizer), buffers=buffers, process=process)

    def activation_bytes(self) -> float:
        """Return the bytes of the layers' outputs and their gradients at their peak."""
        return FLOAT * self.local_batch_size * self.row_activations

    def step(self) -> Step:
        """Return the work of the layers; every weight is read three times and updated."""
        moved = FLOAT * self.local_batch_size * self.row_traffic + 8 * FLOAT * self.parameters
        reduced = all_reduce_step(FLOAT * self.parameters, self.world_size, self.local_world_size)
        return reduced + Step(memory_bytes=moved, flops=3 * self.local_batch_size * self.row_flops)
