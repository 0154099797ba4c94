"""The work and the memory of the layers beside a model's tables, measured for the planner on tensors without values.

On the meta device tensors have shapes alone, so that nothing is allocated, and nothing needs to be known of the layers.
"""

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings.planning.cost_model import Optimizer
from mlet_dist.embeddings.planning.dense_cost import DenseCost
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.models.stand_in_tables import check_logits, stand_in_tables
from mlet_dist.models.tables import collections_of

_ROWS = 64
_FLOAT_BYTES = 4


def dense_cost(
    model: nn.Module,
    dense_columns: int | None,
    local_batch_size: int,
    optimizer: Optimizer,
    world_size: int,
    local_world_size: int,
    sequence_length: float = 1,
    *,
    on_cpu: bool = False,
) -> DenseCost:
    """Return the cost of a model's layers other than tables for one rank.

    Args:
        model: the model, not sharded; the layers may be on any device.
        dense_columns: D; None, or a network that cannot run on the meta device, leaves an estimate from the sizes of
            the linear layers, which ``note`` of the result then says.
        local_batch_size: b.
        optimizer: of the layers.
        world_size: R.
        local_world_size: L.
        sequence_length: the average number of ids of a sequence.
        on_cpu: whether the layers will compute on a CPU.
    """
    of_tables = {id(parameter) for tables in collections_of(model).values() for parameter in tables.parameters()}
    parameters = sum(each.numel() for each in model.parameters() if id(each) not in of_tables)
    note = None
    try:
        if dense_columns is None:
            raise ValueError("the number of dense columns is not known")
        work = _measure(model, dense_columns, max(1, round(sequence_length)))
    except Exception as error:  # whatever the user's forward raises on tensors without values
        if dense_columns is not None:
            reason = " ".join(str(error).split())[:200]
            note = (
                f"the network cannot run on meta tensors ({type(error).__name__}: {reason}), so that its memory and "
                "time are estimated from the sizes of its linear layers"
            )
        work = _estimate(model, parameters)
    return DenseCost(
        parameters=parameters,
        **work,
        local_batch_size=local_batch_size,
        optimizer=optimizer,
        world_size=world_size,
        local_world_size=local_world_size,
        on_cpu=on_cpu,
        note=note,
    )


def sequence_length(tables: Sequence[MultiLayerEmbeddingBagConfig], pooling_factors: Mapping[str, float]) -> float:
    """Return the average number of ids of the sequences of a model's tables, of which some may be pooled."""
    lengths = [
        pooling_factors.get(table.name, 1.0)
        for table in tables
        if table.pooling == PoolingType.NONE
        for _ in table.feature_names
    ]
    return sum(lengths) / len(lengths) if lengths else 1.0


def _measure(model: nn.Module, dense_columns: int, sequence_length: int) -> dict[str, float]:
    """Return ``row_flops``, ``row_activations`` and ``row_traffic`` of DenseCost."""
    # Two sizes, because weights take part in the work of every batch and do not grow with its rows.
    few, many = (_work_of(model, dense_columns, sequence_length, rows) for rows in (_ROWS, 2 * _ROWS))
    names = ("row_flops", "row_activations", "row_traffic")
    return {name: (more - less) / _ROWS for name, less, more in zip(names, few, many, strict=True)}


def _work_of(model: nn.Module, dense_columns: int, sequence_length: int, rows: int) -> tuple[float, float, float]:
    """Return the operations of forward, and of a step without tables the floats at their peak and those that move."""
    meta = torch.device("meta")
    with stand_in_tables(model, rows, meta, (sequence_length,)) as tables:
        state = {name: tensor.to(meta) for name, tensor in chain(model.named_parameters(), model.named_buffers())}
        weights = [state[name].requires_grad_() for name, each in model.named_parameters() if each.is_floating_point()]
        inputs = torch.empty(rows, dense_columns, device=meta), tables.batch()
        with FlopCounterMode(display=False) as counter:
            check_logits(functional_call(model, state, inputs), rows, labels=None)
        memory = []
        # Gradients of weights do not grow with the rows, but are computed from what does.
        vectors = list(tables.vectors.values())
        for inputs_of_backward in (vectors, [*vectors, *weights]):
            with _Memory() as found:
                logits = functional_call(model, state, inputs).reshape(-1).float()
                loss = functional.binary_cross_entropy_with_logits(logits, torch.empty_like(logits))
                torch.autograd.grad(loss, inputs_of_backward, allow_unused=True)
            memory.append(found)
            del logits, loss
    return counter.get_total_flops(), memory[0].peak / _FLOAT_BYTES, memory[1].moved / _FLOAT_BYTES


class _Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within the block create, read and write.

    Attributes:
        peak: the most bytes of created tensors that lived at the same time.
        moved: the bytes that all operations read and wrote; views move none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.moved = self._bytes = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata: each for each in _tensors((args, kwargs))}
        created = [each for each in _tensors(result) if each.untyped_storage()._cdata not in given]
        for tensor in created:
            storage = tensor.untyped_storage()
            if storage not in self._counted:
                self._counted.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        if created:
            self.moved += sum(each.nbytes for each in (*created, *given.values()))
        return result

    def _add(self, bytes_: int) -> None:
        self._bytes += bytes_
        self.peak = max(self.peak, self._bytes)


def _tensors(values: object) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _estimate(model: nn.Module, parameters: int) -> dict[str, float]:
    """Return what ``_measure`` would, by the linear layers alone."""
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    held = float(sum(widths) + 2 * max(widths, default=0))
    return {"row_flops": 2.0 * parameters, "row_activations": held, "row_traffic": 3 * held}
