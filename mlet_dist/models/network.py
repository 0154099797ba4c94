"""What a model does with the vectors of its tables: checked, and measured for the planner, on stand-in tables.

The network is whatever a model holds beside its tables. It runs here once on made vectors, so that nothing needs to be
known of its layers: on the meta device, where tensors have shapes and no values, to be measured, and on a CPU to be
checked.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.fx._symbolic_trace import PHWithMeta
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.embeddings.planning.cost_model import Optimizer
from mlet_dist.embeddings.planning.plan_cost import DenseCost
from mlet_dist.errors import UserError
from mlet_dist.models.builder import in_one_line
from mlet_dist.models.tables import layers_beside_tables, tables_of, tables_path

_ROWS = 64
_FLOAT_BYTES = 4


def dense_cost(
    model: nn.Module,
    dense_columns: int | None,
    local_batch_size: int,
    optimizer: Optimizer,
    world_size: int,
    local_world_size: int,
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
    """
    tables = tables_of(model)
    of_tables = {id(parameter) for parameter in tables.parameters()}
    parameters = sum(each.numel() for each in model.parameters() if id(each) not in of_tables)
    note = None
    try:
        if dense_columns is None:
            raise ValueError("the number of dense columns is not known")
        work = _measure(model, dense_columns)
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
        note=note,
    )


def check_network(model: nn.Module, dense_columns: int) -> None:
    """Check a model of ``model.builder``: its logits depend on all features, and that of a row on no other row.

    Batches are split among ranks and padded, so that statistics over their rows, as those of batch normalization, are
    of other rows on every rank, and of padding.

    Args:
        model: the model, with its layers on a CPU, not sharded; it is in training mode and stays as it is.
        dense_columns: D.

    Raises:
        UserError: forward fails, returns something else, calls the tables several times, leaves a feature out, mixes
            rows, changes a buffer, or creates a parameter.
    """
    with torch.random.fork_rng(devices=[]), _stand_in_tables(model, _ROWS, torch.device("cpu")) as tables:
        torch.manual_seed(0)
        dense = torch.randn(_ROWS, dense_columns, requires_grad=True)
        parameters, buffers = set(_names(model.named_parameters())), _copies(model)
        try:
            logits = model(dense.clone(), tables.batch())  # a copy, since forward may change what it is given
        except Exception as error:
            raise UserError(f"model.builder: forward of the module failed: {in_one_line(error)}") from error
        _check_logits(logits, _ROWS)
        created = [name for name in _names(model.named_parameters()) if name not in parameters]
        if created:
            raise UserError(
                f"model.builder: forward creates the parameter {created[0]!r}; create it in the builder, with its size"
            )
        _check_buffers(buffers, dict(model.named_buffers()))
        if tables.calls != 1:
            raise UserError(
                f"model.builder: forward calls embedding_bag_collection {tables.calls} times; a sharded collection "
                "exchanges the vectors of a batch once"
            )
        if logits.requires_grad:
            _check_rows(logits.reshape(-1).float(), [dense, *tables.vectors])
            logits.float().sum().backward()
        gradients = [None if each.grad is None else each.grad.abs().max() for each in tables.vectors]
        unused = [
            name
            for name, each in zip(tables.features, gradients, strict=True)
            if each is None or not bool(each)  # no row's vector has any influence
        ]
        model.zero_grad()
    if unused:
        raise UserError(
            f"model.builder: the logits do not depend on feature {unused[0]!r}; use it, or leave it out of "
            "data.sparse_features"
        )


def tracing_problem(model: nn.Module) -> str | None:
    """Return why TorchRec's pipeline cannot trace a model by torch.fx; None if it can.

    The pipeline traces what calls the tables. It does not look into modules that do not hold them.
    """
    network = model.module if isinstance(model, DistributedModelParallel) else model
    leaves = [tables_path(model), *(name for name, _ in layers_beside_tables(model))]
    try:
        Tracer(leaf_modules=leaves).trace(network, concrete_args=(PHWithMeta("dense"), PHWithMeta("sparse")))
    except Exception as error:  # whatever the user's forward raises on proxies
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


class _StandInTables(nn.Module):
    """Returns made vectors for any batch."""

    def __init__(self, configs: list[EmbeddingBagConfig], rows: int, device: torch.device) -> None:
        super().__init__()
        dims = {name: table.embedding_dim for table in configs for name in table.feature_names}
        self.features, self.dims = list(dims), list(dims.values())
        self.vectors = [torch.randn(rows, dim, device=device, requires_grad=True) for dim in self.dims]
        self.calls, self._configs, self._rows, self._device = 0, configs, rows, device

    def batch(self) -> KeyedJaggedTensor:
        """Return a batch of one id for each feature and row."""
        ids = torch.zeros(self._rows * len(self.features), dtype=torch.int64, device=self._device)
        return KeyedJaggedTensor(self.features, ids, lengths=torch.ones_like(ids), stride=self._rows)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        self.calls += 1
        return KeyedTensor(self.features, self.dims, torch.cat(self.vectors, dim=1))


@contextmanager
def _stand_in_tables(model: nn.Module, rows: int, device: torch.device) -> Iterator[_StandInTables]:
    """Put stand-in tables into a model within the block."""
    own, path = tables_of(model), tables_path(model)
    parent = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    configs = cast(EmbeddingBagCollectionInterface, own).embedding_bag_configs()
    found = _StandInTables(configs, rows, device)
    setattr(parent, name, found)
    try:
        yield found
    finally:
        setattr(parent, name, own)


def _measure(model: nn.Module, dense_columns: int) -> dict[str, float]:
    """Return ``row_flops``, ``row_activations`` and ``row_traffic`` of DenseCost."""
    # Two sizes, because weights take part in the work of every batch and do not grow with its rows.
    few, many = (_work_of(model, dense_columns, rows) for rows in (_ROWS, 2 * _ROWS))
    names = ("row_flops", "row_activations", "row_traffic")
    return {name: (more - less) / _ROWS for name, less, more in zip(names, few, many, strict=True)}


def _work_of(model: nn.Module, dense_columns: int, rows: int) -> tuple[float, float, float]:
    """Return the operations of forward, and of a step without tables the floats at their peak and those that move."""
    meta = torch.device("meta")
    with _stand_in_tables(model, rows, meta) as tables:
        state = {name: tensor.to(meta) for name, tensor in chain(model.named_parameters(), model.named_buffers())}
        weights = [state[name].requires_grad_() for name, each in model.named_parameters() if each.is_floating_point()]
        inputs = torch.empty(rows, dense_columns, device=meta), tables.batch()
        with FlopCounterMode(display=False) as counter:
            _check_logits(functional_call(model, state, inputs), rows)
        memory = []
        # Gradients of weights do not grow with the rows, but are computed from what does.
        for inputs_of_backward in (tables.vectors, [*tables.vectors, *weights]):
            with _Memory() as found:
                logits = functional_call(model, state, inputs).reshape(-1).float()
                loss = functional.binary_cross_entropy_with_logits(logits, torch.empty(rows, device=meta))
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


def _check_logits(logits: object, rows: int) -> None:
    expected = f"logits ({rows},) or ({rows}, 1) of floating point numbers for {rows} rows"
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"model.builder: the module returned {type(logits).__name__}; it must return {expected}")
    if tuple(logits.shape) not in ((rows,), (rows, 1)) or not logits.is_floating_point():
        raise UserError(
            f"model.builder: the module returned {tuple(logits.shape)} of {logits.dtype}; it must return {expected}"
        )


def _names(named: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    return [name for name, _ in named]


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _check_buffers(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    for name, buffer in after.items():
        old = before.get(name)
        if old is None or old.shape != buffer.shape or not bool(_same(old, buffer).all()):
            raise UserError(
                f"model.builder: forward changes the buffer {name!r} in training; every rank would have its own, of "
                "its rows and of padding; use a layer without running statistics, as nn.LayerNorm for nn.BatchNorm1d"
            )


def _same(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (some == others) | ((some != some) & (others != others))  # NaN is the same as NaN


def _check_rows(logits: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Check that the logits of the first half of the rows have no gradient of inputs of the others."""
    half = len(logits) // 2
    gradients = torch.autograd.grad(logits[:half].sum(), inputs, retain_graph=True, allow_unused=True)
    if any(each is not None and bool((each[half:].abs() > 0).any()) for each in gradients):
        raise UserError(
            "model.builder: the logit of a row depends on other rows of the batch; batches are split among ranks and "
            "padded, so compute each row by itself"
        )


def _estimate(model: nn.Module, parameters: int) -> dict[str, float]:
    """Return what ``_measure`` would, by the linear layers alone."""
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    held = float(sum(widths) + 2 * max(widths, default=0))
    return {"row_flops": 2.0 * parameters, "row_activations": held, "row_traffic": 3 * held}
