"""Count the collectives of a step, and where its host would wait for a device, by the operators that it dispatches.

::

    with count_step_operations() as counts:
        step()
    counts.collectives            # {"alltoall_base_": 4, "allreduce_": 2}
    counts.host_synchronisations  # 2

On a CPU nothing waits for a device. There, the operators are counted that would wait if their tensors were on CUDA, so
that a machine without a GPU can tell. Code that only runs for tensors on a CPU is left out (``CPU_ONLY``).
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

CPU_ONLY: frozenset[tuple[str, str]] = frozenset(
    {
        ("input_check.py", "_find_inconsistency"),
        ("batch_agreement.py", "_has_none_outside"),
        ("row_lookup.py", "_pooled_rows"),
    }
)
"""File and function of branches that are taken for tensors on a CPU only."""

# Their results have a size or a value that the host must know.
_WAITING = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
_INDEXING = frozenset({"_index_put_impl_", "index", "index_put", "index_put_"})
# They are no collectives, or end the process group's work on the host alone.
_NOT_COLLECTIVE = frozenset({"monitored_barrier_", "recv_", "recv_any_source_", "send"})
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Operation:
    """An operator that a step dispatched.

    Attributes:
        name: of the operator, such as ``allreduce_`` or ``nonzero``.
        place: ``file.py:line function`` of the innermost caller outside torch.
        group: of a collective, the name of its process group.
        device: of a collective, the type of the device of its tensors.
    """

    name: str
    place: str
    group: str = ""
    device: str = ""


@dataclass
class StepOperations:
    """The collectives and host synchronisations of one rank within a block, in order."""

    collective_calls: list[Operation] = field(default_factory=list)
    synchronisation_calls: list[Operation] = field(default_factory=list)

    @property
    def collectives(self) -> dict[str, int]:
        """The number of collectives by name."""
        return dict(Counter(call.name for call in self.collective_calls))

    @property
    def host_synchronisations(self) -> int:
        """The number of times that the host would wait for a device."""
        return len(self.synchronisation_calls)


@contextmanager
def count_step_operations() -> Iterator[StepOperations]:
    """Count the operators of this thread within the block, and of the backward passes that it runs."""
    counts, thread = StepOperations(), threading.get_ident()
    tolist = torch.Tensor.tolist

    def counted_tolist(tensor: torch.Tensor) -> Any:
        if threading.get_ident() == thread:
            _add_synchronisation(counts, "tolist")
        with torch._C._DisableTorchDispatch():  # it copies and reads the tensor
            return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", counted_tolist), _Counting(counts):
        yield counts


class _Counting(TorchDispatchMode):
    def __init__(self, counts: StepOperations) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        if operator.namespace in ("c10d", "_c10d_functional"):
            if name not in _NOT_COLLECTIVE and not name.startswith("wait"):
                tensors = list(_tensors(args))
                device = tensors[0].device.type if tensors else ""
                self._counts.collective_calls.append(Operation(name, _place()[0], _group_of(args), device))
        elif _waits(operator, name, args, kwargs):
            _add_synchronisation(self._counts, name)
        return operator(*args, **kwargs)


def _waits(operator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _WAITING:
        return True
    if name in _INDEXING:
        return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[-1], torch.Tensor)
    if name in ("_to_copy", "copy_"):
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], kwargs.get("device"))
        target = target.device if isinstance(target, torch.Tensor) else target
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        return waits and target is not None and torch.device(target).type != source.device.type
    return False


def _add_synchronisation(counts: StepOperations, name: str) -> None:
    place, source = _place()
    if source not in CPU_ONLY:
        counts.synchronisation_calls.append(Operation(name, place))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _group_of(args: tuple[Any, ...]) -> str:
    for each in args:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            name: str = dist.ProcessGroup.unbox(each).group_name
            return name
    return next((each for each in reversed(args) if isinstance(each, str)), "")


def _place() -> tuple[str, tuple[str, str]]:
    """Return the innermost caller outside torch, as text and as file and function."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith((_TORCH, "<")):
            break
        frame = frame.f_back
    name, function = Path(frame.f_code.co_filename).name, frame.f_code.co_name
    return f"{name}:{frame.f_lineno} {function}", (name, function)
