"""Finds the collections of embedding tables in a model, whatever the model calls them, and the layers beside them.

A model has a collection of tables whose vectors are pooled, or one of tables of sequences, or both.
"""

from collections.abc import Collection, Iterator

from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from mlet_dist.embeddings import ShardedMultiLayerEmbeddingCollection
from mlet_dist.models.spec import BAG_ROWS, SEQUENCE_ROWS

_SEQUENCES = (EmbeddingCollectionInterface, ShardedMultiLayerEmbeddingCollection)
_COLLECTIONS = (EmbeddingBagCollectionInterface, ShardedEmbeddingBagCollection, *_SEQUENCES)


def collections_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's collections of tables by their names among its modules, as in its state dict.

    They are the first of bags, and the first of sequences.

    Args:
        model: a model with collections, sharded or not, of trained, plain, quantised or mixed tables.

    Raises:
        ValueError: the model holds no collection.
    """
    root = model.module if isinstance(model, DistributedModelParallel) else model
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():  # outer modules come before those within them
        if isinstance(module, _COLLECTIONS) and holds_sequences(module) not in map(holds_sequences, found.values()):
            found[name] = module
    if not found:
        raise ValueError(f"{type(root).__name__} holds no collection of embedding tables")
    return found


def holds_sequences(collection: nn.Module) -> bool:
    """Return whether a collection is one of tables of sequences."""
    return isinstance(collection, _SEQUENCES)


def table_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of tables in the state dict, for ``str.startswith``; raises as above."""
    return tuple(f"{path}." for path in collections_of(model))


def row_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of ``<table>.weight`` of the rows in the state dict of a model that is trained."""
    return tuple(
        f"{path}.{SEQUENCE_ROWS if holds_sequences(each) else BAG_ROWS}."
        for path, each in collections_of(model).items()
    )


def layers_beside_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the outermost modules that hold no tables; raises as ``collections_of``."""
    root = model.module if isinstance(model, DistributedModelParallel) else model
    yield from _without(list(collections_of(root).values()), root, "")


def _without(tables: Collection[nn.Module], module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inside = list(child.modules())
        if child in tables:
            continue
        if any(each in tables for each in inside):
            yield from _without(tables, child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
