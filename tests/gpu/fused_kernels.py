"""What only fbgemm's and torch's CUDA kernels do, against the code that stands in for them on a CPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlet_dist.embeddings import LazyAdam
from tests.gpu.machine import Machine


def fused_adam_is_lazy_adam(machine: Machine) -> str:
    """fbgemm's fused Adam and LazyAdam: the same rows after five steps."""
    machine.needs_cuda("fbgemm has no fused Adam on a CPU")
    largest = machine.pools(1).run(_largest_difference)[0]
    assert largest < 2e-6, largest
    return f"rows differ by at most {largest:.1e}"


def steps_without_host_copies(machine: Machine) -> str:
    """LazyAdam's step on a GPU copies nothing to the host."""
    if machine.device == "cpu":
        with FakeTensorMode():  # its tensors have no values that could be copied
            _take_steps(torch.device("cuda"))
        return "FakeTensorMode with device cuda raised nothing"
    machine.pools(1).run(_step_in_sync_debug_mode)
    return "torch.cuda.set_sync_debug_mode('error') raised nothing"


def _gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.rand(3, 4, generator=generator) - 0.5 for _ in range(5)]
    found[1][1] = found[3][1] = 0
    return found


def _largest_difference() -> float:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(3, 4, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.ADAM,
        learning_rate=1e-3,
        eps=1e-8,
        beta1=0.9,
        beta2=0.999,
    )
    initial = torch.linspace(0.5, 1.5, 12).view(3, 4)
    kernel.split_embedding_weights()[0].copy_(initial)
    weight = torch.nn.Parameter(initial.clone().cuda())
    optimizer = LazyAdam([weight], lr=1e-3)
    for gradient in _gradients():
        rows = gradient.any(dim=1).nonzero().squeeze(1).cuda()
        kernel(rows, torch.arange(len(rows) + 1, device="cuda")).backward(gradient.cuda()[rows])
        weight.grad = gradient.cuda()
        optimizer.step()
    return float((kernel.split_embedding_weights()[0] - weight.detach()).abs().max())


def _take_steps(device: torch.device) -> LazyAdam:
    weight = torch.nn.Parameter(torch.empty(50, 8, device=device))
    optimizer = LazyAdam([weight])
    weight.grad = torch.empty(50, 8, device=device)
    optimizer.step()
    return optimizer


def _step_in_sync_debug_mode() -> None:
    optimizer = _take_steps(torch.device("cuda"))  # CUDA loads kernels when they are first used
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
