"""Count the bytes that this rank's collectives send, by wrapping the functions of torch.distributed."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist


@dataclass
class Traffic:
    """The bytes that this rank has sent to other ranks.

    Attributes:
        vector_bytes: Floating-point vectors and their gradients, without the all-reduce of replicated weights.
        index_bytes: Integers: ids, sizes, and flags that ranks agree on.
        weight_bytes: All-reduced gradients of replicated weights, counted once.
        calls: (collective, dtype, bytes) of each call, in order.
    """

    vector_bytes: int = 0
    index_bytes: int = 0
    weight_bytes: int = 0
    calls: list[tuple[str, torch.dtype, int]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor, elements: int) -> None:
        size = elements * tensor.element_size()
        self.calls.append((name, tensor.dtype, size))
        if not tensor.dtype.is_floating_point:
            self.index_bytes += size
        elif name == "all_reduce":
            self.weight_bytes += size
        else:
            self.vector_bytes += size


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count within the block; the collectives of torch.distributed run unchanged."""
    traffic = Traffic()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            collective, tensor, elements = _sent(name, signature.bind(*args, **kwargs).arguments)
            traffic.add(collective, tensor, elements)
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(name) for name in _COLLECTIVES}):
        yield traffic


_COLLECTIVES = (
    "all_to_all_single",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
)


def _sent(name: str, given: dict[str, Any]) -> tuple[str, torch.Tensor, int]:
    """Return the collective, a tensor of its dtype, and the number of elements that go to other ranks."""
    group = given.get("group")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if name == "all_to_all_single":
        tensor, splits = given["input"], given.get("input_split_sizes")
        rows = splits[rank] if splits else tensor.shape[0] // world_size
        width = tensor[0].numel() if tensor.shape[0] else 0
        return name, tensor, tensor.numel() - rows * width
    if name == "reduce_scatter_tensor":
        return "reduce_scatter", given["input"], given["input"].numel() - given["output"].numel()
    if name == "reduce_scatter":
        sent = sum(each.numel() for each in given["input_list"])
        return name, given["output"], sent - given["output"].numel()
    if name == "all_gather_into_tensor":
        tensor = given["input_tensor"]
        return "all_gather", tensor, tensor.numel() * (world_size - 1)
    if name == "all_gather":
        return name, given["tensor"], given["tensor"].numel() * (world_size - 1)
    return name, given["tensor"], given["tensor"].numel()
