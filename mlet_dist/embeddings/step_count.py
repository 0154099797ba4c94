"""How many steps fused kernels have taken, for optimizers whose update depends on it."""

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper


class StepCountingOptimizer(OptimizerWrapper):
    """TorchRec's fused optimizer, whose kernels know how many steps were taken; call ``zero_grad`` before forward.

    Adam corrects its bias by that number. fbgemm counts forward passes instead, those of evaluation too, and TorchRec
    neither saves the count nor can set it once a batch has passed (``set_optimizer_step`` changes ``iter``, which is
    read while ``iter_cpu`` is 0). The count is the state ``step`` of every parameter.

    Args:
        optimizer: ``model.fused_optimizer``.
        model: the sharded model.
    """

    def __init__(self, optimizer: KeyedOptimizer, model: nn.Module) -> None:
        super().__init__(optimizer)
        self._kernels = fused_kernels(model)
        self.steps = torch.tensor(0, dtype=torch.int64)
        for states in optimizer.state.values():
            states["step"] = self.steps

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set the kernels' learning rate and count for the forward pass that follows."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.iter.fill_(int(self.steps))
            kernel.iter_cpu.fill_(int(self.steps))

    def step(self, closure: Any = None) -> None:
        """Count the step, which backward has taken."""
        super().step(closure)
        self.steps += 1


def fused_kernels(model: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """fbgemm's kernels that update rows inside backward."""
    return [
        kernel
        for collection in model.modules()
        if isinstance(collection, ShardedEmbeddingBagCollection)
        for lookup in collection._lookups
        for kernel in lookup.modules()
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
    ]
