"""Adam for rows, as fbgemm fuses it: on dense gradients where no kernel does, and with steps counted where one does."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper


class LazyAdam(torch.optim.Optimizer):
    """Adam that steps only the rows with a gradient, by the formula of fbgemm's ``OptimType.ADAM``.

    m = β1·m + (1-β1)·g, v = β2·v + (1-β2)·g², w = w - lr·(m/(1-β1ᵗ)) / (sqrt(v/(1-β2ᵗ)) + eps), where t counts all
    steps, also those in which a row stood still; fbgemm counts forward passes, evaluation's too. A row whose gradient
    is zero throughout counts as not looked up.
    State: ``step`` (), ``exp_avg`` and ``exp_avg_sq`` ``(n, k)``, made at once, so that a checkpoint can be loaded. For
    sharded rows on a CPU they are plain tensors of this rank's rows: torch.distributed.checkpoint, given them under the
    parameter's name on several ranks, keeps one rank's.

    Args:
        params: weights ``(n, k)`` with a dense gradient.
        lr: learning rate.
        betas: β1 and β2.
        eps: added to the root of v.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight] = {
                    "step": torch.tensor(0, dtype=torch.int64),
                    "exp_avg": torch.zeros_like(weight.detach()),
                    "exp_avg_sq": torch.zeros_like(weight.detach()),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every weight once; returns what ``closure``, which computes the gradients again, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] += 1
                if weight.grad is not None:
                    _step_rows(weight, weight.grad, state, group)
        return loss


def _step_rows(weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    rows = (gradient != 0).any(dim=1).nonzero().squeeze(1)
    gradient = gradient[rows]
    mean = state["exp_avg"][rows].mul_(beta1).add_(gradient, alpha=1 - beta1)
    square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["exp_avg"][rows] = mean
    state["exp_avg_sq"][rows] = square
    divisor = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.index_add_(0, rows, mean.div_(divisor), alpha=-group["lr"] / (1 - beta1**step))


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
