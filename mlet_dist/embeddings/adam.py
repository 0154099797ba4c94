"""Adam for embedding rows by fbgemm's formula.

``LazyAdam`` applies it to dense gradients where there is no fused kernel (on a CPU, and for replicated tables).
``StepCountingOptimizer`` passes the number of steps to the fused kernels.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper


class LazyAdam(torch.optim.Optimizer):
    """Adam that updates only rows with a nonzero gradient, by the formula of fbgemm's ``OptimType.ADAM``.

    m = β1·m + (1-β1)·g, v = β2·v + (1-β2)·g², w = w - lr·(m/(1-β1ᵗ)) / (sqrt(v/(1-β2ᵗ)) + eps), where t counts all
    steps, including those that do not update the row. (fbgemm counts forward passes, including those of evaluation.) A
    row whose gradient is zero in every column is treated as not looked up.

    The state is ``step`` ``()``, ``exp_avg`` and ``exp_avg_sq`` ``(n, k)``. It is created with the optimizer, so that a
    checkpoint can be loaded into it. For sharded rows on a CPU the state is a plain tensor of this rank's rows; note
    that torch.distributed.checkpoint stores only one rank's tensor if several ranks pass it under the same name.

    Args:
        params: weights ``(n, k)`` with dense gradients.
        lr: learning rate.
        betas: β1 and β2.
        eps: added to the square root of v.
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
        """Update every weight once and return the loss of ``closure``, which recomputes the gradients, if given."""
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
    """Update a weight and its state; both ways round alike."""
    if weight.is_cpu:
        _step_looked_up_rows(weight, gradient, state, group)
    else:
        _step_by_mask(weight, gradient, state, group)


def _step_looked_up_rows(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """Compute the looked-up rows alone. Their number has to be on the host, for which a GPU would be waited for."""
    rows = (gradient != 0).any(dim=1).nonzero().squeeze(1)
    mean, square = state["exp_avg"][rows], state["exp_avg_sq"][rows]
    update, rate = _adam_update(mean, square, gradient[rows], int(state["step"]), group)
    state["exp_avg"][rows] = mean
    state["exp_avg_sq"][rows] = square
    weight.index_add_(0, rows, update, alpha=-rate)


def _step_by_mask(weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Compute all rows, and keep the old values of those that were not looked up: nothing waits for the device."""
    looked_up = (gradient != 0).any(dim=1, keepdim=True)
    mean, square = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    update, rate = _adam_update(mean, square, gradient, int(state["step"]), group)
    for kept, computed in (
        (state["exp_avg"], mean),
        (state["exp_avg_sq"], square),
        (weight, weight.add(update, alpha=-rate)),
    ):
        torch.where(looked_up, computed, kept, out=kept)


def _adam_update(
    mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor, step: int, group: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """Update both moments in place; return what times the rate, which is returned, too, is subtracted from rows."""
    beta1, beta2 = group["betas"]
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    divisor = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return mean / divisor, group["lr"] / (1 - beta1**step)


class StepCountingOptimizer(OptimizerWrapper):
    """TorchRec's fused optimizer with a step count that is saved and restored; call ``zero_grad`` before forward.

    Adam's bias correction needs the number of steps. fbgemm counts forward passes instead, including those of
    evaluation. TorchRec does not save that count and cannot set it after the first batch: its ``set_optimizer_step``
    writes ``iter``, which the kernel reads only while ``iter_cpu`` is 0. Here the count is the state ``step`` of every
    parameter, and ``zero_grad`` writes it to the kernels.

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
        """Pass the learning rate and the step count to the kernels, for the next forward pass."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.iter.fill_(int(self.steps))
            kernel.iter_cpu.fill_(int(self.steps))

    def step(self, closure: Any = None) -> None:
        """Increment the step count; backward has updated the rows already."""
        super().step(closure)
        self.steps += 1


def fused_kernels(model: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """Return the fbgemm kernels of ``model`` that update rows in backward."""
    return [
        kernel
        for collection in model.modules()
        if isinstance(collection, ShardedEmbeddingBagCollection)
        for lookup in collection._lookups
        for kernel in lookup.modules()
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
    ]
