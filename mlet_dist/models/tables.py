"""Finds the collection of embedding tables in a model, whatever the model calls it, and the layers beside it."""

from collections.abc import Iterator

from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

_COLLECTIONS = (EmbeddingBagCollectionInterface, ShardedEmbeddingBagCollection)


def tables_path(model: nn.Module) -> str:
    """Return the name of the model's collection of tables among its modules, as in its state dict.

    Args:
        model: a model with one collection, sharded or not, of trained, plain, quantised or mixed tables.

    Raises:
        ValueError: the model holds no collection.
    """
    root = model.module if isinstance(model, DistributedModelParallel) else model
    for name, module in root.named_modules():  # outer modules come before those within them
        if isinstance(module, _COLLECTIONS):
            return name
    raise ValueError(f"{type(root).__name__} holds no collection of embedding tables")


def tables_prefix(model: nn.Module) -> str:
    """Return the prefix of ``embedding_bags.<table>.weight`` and ``projections.<table>.weight`` in its state dict."""
    return f"{tables_path(model)}."


def tables_of(model: nn.Module) -> nn.Module:
    """Return the model's collection of tables; raises as ``tables_path``."""
    root = model.module if isinstance(model, DistributedModelParallel) else model
    return root.get_submodule(tables_path(model))


def layers_beside_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the outermost modules that do not hold the tables; raises as ``tables_path``."""
    root = model.module if isinstance(model, DistributedModelParallel) else model
    yield from _without(tables_of(root), root, "")


def _without(tables: nn.Module, module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if tables not in child.modules():
            yield f"{prefix}{name}", child
        elif child is not tables:
            yield from _without(tables, child, f"{prefix}{name}.")
