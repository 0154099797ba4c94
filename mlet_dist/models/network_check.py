"""Checks the network of ``model.builder``: it runs once on made vectors, and is traced as by TorchRec's pipeline."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.fx._symbolic_trace import PHWithMeta
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.tracing import Tracer

from mlet_dist.errors import UserError
from mlet_dist.models.builder import in_one_line
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.stand_in_tables import StandIns, check_logits, stand_in_tables
from mlet_dist.models.tables import collections_of, holds_sequences, layers_beside_tables

_ROWS = 64
_SEQUENCE_LENGTHS = (2, 0, 3, 1)
"""Those of rows in turn, so that the first half of the vectors is that of the first half of the rows."""


def check_network(model: nn.Module, dense_columns: int, labels: int = 1, nested_dims: Sequence[int] = ()) -> None:
    """Check a model of ``model.builder``: its logits depend on all features, and that of a row on no other row.

    Batches are split among ranks and padded, so that statistics over their rows, as those of batch normalization, are
    of other rows on every rank, and of padding.

    Args:
        model: the model, with its layers on a CPU, not sharded; it is in training mode and stays as it is.
        dense_columns: D.
        labels: L.
        nested_dims: the widths below d at which the model is trained, too.

    Raises:
        UserError: forward fails, returns something else, calls the tables several times, leaves a feature out, mixes
            rows, changes a buffer, or creates a parameter.
    """
    cpu = torch.device("cpu")
    sequences = [path for path, each in collections_of(model).items() if holds_sequences(each)]
    with torch.random.fork_rng(devices=[]), stand_in_tables(model, _ROWS, cpu, _SEQUENCE_LENGTHS) as tables:
        torch.manual_seed(0)
        dense = torch.randn(_ROWS, dense_columns, requires_grad=True)
        parameters, buffers = set(_names(model.named_parameters())), _copies(model)
        try:
            logits = model(dense.clone(), tables.batch())  # a copy, since forward may change what it is given
        except (Exception, SystemExit) as error:
            raise UserError(f"model.builder: forward of the module failed: {in_one_line(error)}") from error
        check_logits(logits, _ROWS, labels)
        created = [name for name in _names(model.named_parameters()) if name not in parameters]
        if created:
            raise UserError(
                f"model.builder: forward creates the parameter {created[0]!r}; create it in the builder, with its size"
            )
        _check_buffers(buffers, dict(model.named_buffers()))
        for path, each in tables.tables.items():
            if each.calls != 1:
                name = "embedding_collection" if path in sequences else "embedding_bag_collection"
                raise UserError(
                    f"model.builder: forward calls {name} {each.calls} times; a sharded collection exchanges the "
                    "vectors of a batch once"
                )
        if nested_dims:
            _check_widths(model, dense.detach(), tables, labels, nested_dims)
        if logits.requires_grad:
            _check_rows(logits.reshape(_ROWS, -1).float(), [dense, *tables.vectors.values()])
            logits.float().sum().backward()
        gradients = {
            name: None if each.grad is None else each.grad.abs().max() for name, each in tables.vectors.items()
        }
        unused = [
            name
            for name, each in gradients.items()
            if each is None or not bool(each)  # no row has any influence
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
    leaves = [*collections_of(model), *(name for name, _ in layers_beside_tables(model))]
    try:
        Tracer(leaf_modules=leaves).trace(network, concrete_args=(PHWithMeta("dense"), PHWithMeta("sparse")))
    except Exception as error:  # whatever the user's forward raises on proxies
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _check_widths(
    model: nn.Module, dense: torch.Tensor, tables: StandIns, labels: int, nested_dims: Sequence[int]
) -> None:
    """Check that a network takes the vectors of each row several times, with zeros in their trailing columns."""
    embedding_dim = next(iter(tables.vectors.values())).shape[1]
    widths = NestedWidths(tables.tables.values(), None, embedding_dim, nested_dims)
    try:
        found = widths.at_all(model, dense, tables.batch())
    except (Exception, SystemExit) as error:
        raise UserError(
            "model.nested_dims: forward of the module failed with each row repeated for every width, of which the "
            f"KeyedJaggedTensor has one; take rows from the dense columns and the vectors alone: {in_one_line(error)}"
        ) from error
    for logits in found:
        check_logits(logits, len(dense), labels)


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
    """Check that the logits of the first half of the rows have no gradient of inputs of the others.

    The first half of every input belongs to that half of the rows.
    """
    half = len(logits) // 2
    gradients = torch.autograd.grad(logits[:half].sum(), inputs, retain_graph=True, allow_unused=True)
    if any(each is not None and bool((each[len(each) // 2 :].abs() > 0).any()) for each in gradients):
        raise UserError(
            "model.builder: the logit of a row depends on other rows of the batch; batches are split among ranks and "
            "padded, so compute each row by itself"
        )
