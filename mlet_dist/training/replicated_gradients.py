"""Combines the gradients of all replicated parameters over ranks: one all-reduce a step of one flat buffer.

Replicated are the dense layers, W2 and the rows of data_parallel tables. DistributedDataParallel would all-reduce these
in three places, and needs one more collective for parameters that a rank does not use. Rows of sharded tables need
nothing: their owner rank has received all ranks' gradients.
"""

from collections.abc import Iterator

import torch
from torch import distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardingEnv

from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection


class DeferredDataParallel(DataParallelWrapper):
    """Gives the ranks the same dense layers and wraps nothing: ``ReplicatedGradients`` combines all gradients."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Move the model to ``device``, and broadcast its dense layers and buffers. A collective call."""
        dmp._dmp_wrapped_module = dmp._dmp_wrapped_module.to(device)
        _gradient_factors(dmp)  # so that the embeddings leave their gradients to ReplicatedGradients from now on
        for tensor in _dense_tensors(dmp):
            of_first_rank = tensor.clone(memory_format=torch.contiguous_format)
            dist.broadcast(of_first_rank, group=env.process_group, group_src=0)
            if env.rank != 0:
                tensor.copy_(of_first_rank)


class ReplicatedGradients:
    """The gradients of a model's replicated parameters.

    Args:
        model: sharded with ``DeferredDataParallel``, which leaves the gradients of W2 to this class, too.
        process_group: the ranks; all by default.
    """

    def __init__(self, model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
        self._process_group = process_group
        self._world_size = dist.get_world_size(process_group)
        factors = _gradient_factors(model)
        self._summed = [parameter for parameter, factor in factors.items() if factor == 1]
        averaged = [parameter for parameter, factor in factors.items() if factor != 1]
        self._dense = _dense_parameters(model)
        # In this order, so that those that are averaged are one slice of the buffer.
        self._parameters = [*self._dense, *averaged, *self._summed]
        self._num_averaged = sum(each.numel() for each in (*self._dense, *averaged))
        device = self._parameters[0].device if self._parameters else None
        self._all_used = torch.ones(len(self._dense), device=device)

    def combine(self) -> None:
        """Replace each gradient by that of the mean of the ranks' losses. A collective call, after backward.

        A dense parameter that no rank has used keeps ``grad`` None. Only a rank with such a parameter waits for the
        device, to learn whether another rank has used it.
        """
        if self._world_size == 1 or not self._parameters:
            return
        unused = [index for index, parameter in enumerate(self._dense) if parameter.grad is None]
        used = self._all_used
        if unused:
            used = used.index_fill(0, torch.tensor(unused, device=used.device), 0)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._parameters]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used])
        flat[: self._num_averaged] *= 1 / self._world_size
        dist.all_reduce(flat, group=self._process_group)
        parts = flat.split([*(each.numel() for each in self._parameters), len(used)])
        for parameter, part in zip(self._parameters, parts, strict=False):
            parameter.grad = part.view_as(parameter)
        if unused:
            used_by = parts[-1].tolist()
            for index in unused:
                if not used_by[index]:
                    self._dense[index].grad = None


def _gradient_factors(model: nn.Module) -> dict[torch.Tensor, float]:
    """Return the factors of ``defer_gradients`` of all embeddings."""
    factors: dict[torch.Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, ShardedMultiLayerEmbeddingBagCollection):
            factors |= module.defer_gradients()
    return factors


def _dense_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters outside of sharded embeddings that are trained, in the order of the model."""
    found = (each for part in _dense_modules(module) for each in part.parameters(recurse=False) if each.requires_grad)
    return list(dict.fromkeys(found))


def _dense_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return all parameters and buffers outside of sharded embeddings, in the order of the model."""
    found = [*(each.data for part in _dense_modules(module) for each in part.parameters(recurse=False))]
    return [*found, *(each for part in _dense_modules(module) for each in part.buffers(recurse=False))]


def _dense_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules outside of sharded embeddings, outer modules before those within them."""
    if not isinstance(module, ShardedMultiLayerEmbeddingBagCollection):
        yield module
        for child in module.children():
            yield from _dense_modules(child)
