"""Models of the user's own: what ``model.builder`` gets, and the import of it."""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import nn
from torch.nn.parameter import is_lazy

import mlet_dist
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.errors import UserError
from mlet_dist.models.tables import collections_of, holds_sequences


@dataclass(frozen=True)
class ModelInputs:
    """What a model is built for; the argument of ``model.builder``.

    A builder returns a module that takes dense columns ``(B, D)`` float32 and a KeyedJaggedTensor and returns logits
    ``(B,)`` or ``(B, 1)``, with several labels ``(B, L)``. It calls each collection of tables once in forward, with
    that KeyedJaggedTensor, and puts it into the module once, by any name. What else the module holds is trained as
    dense layers on every rank. It is built more than once, with tables on several devices and of several kinds: for
    training, for planning, for evaluation and for serving.

    Attributes:
        embedding_bag_collection: the tables, with the interface of TorchRec's EmbeddingBagCollection: it returns a
            KeyedTensor with the pooled vectors ``(B, d)`` float32 of each feature. None if all are sequences.
        embedding_collection: the tables of ``model.sequences``, with the interface of TorchRec's EmbeddingCollection:
            it returns a JaggedTensor of each feature, with values ``(N, d)`` float32 for N ids. None if there are none.
        dense_features: names of the D dense columns, in order.
        sparse_features: names of the features, in the order of the KeyedJaggedTensor.
        sequences: those among them that are sequences: of ``model.sequences``, and those that share a table with one.
        embedding_dims: d of each feature.
        settings: the section ``model`` of the config.
        labels: the names of the L labels, in the order of the logits; ``label`` if there is one.
    """

    embedding_bag_collection: Any  # an nn.Module, or None
    embedding_collection: Any
    dense_features: tuple[str, ...]
    sparse_features: tuple[str, ...]
    sequences: tuple[str, ...]
    embedding_dims: Mapping[str, int]
    settings: ModelConfig
    labels: tuple[str, ...] = ("label",)

    @property
    def embedding_dim(self) -> int:
        """d, for models whose features all have the same.

        Raises:
            ValueError: features have different d; the message names one.
        """
        d = self.settings.embedding_dim
        for name, own in self.embedding_dims.items():
            if own != d:
                raise ValueError(
                    f"feature {name!r} has vectors of {own} columns, and others of {d}; use embedding_dims"
                )
        return d

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The settings for the builder, ``model.arguments``."""
        return self.settings.arguments


Builder = Callable[[ModelInputs], nn.Module]


def import_builder(path: str) -> Builder:
    """Return the function that ``model.builder`` names; modules in the working directory are found too.

    Args:
        path: ``package.module:function``.

    Raises:
        UserError: the module cannot be imported, or has no such function.
    """
    module_name, _, function = path.partition(":")
    if "" not in sys.path:  # a script's first entry is its own directory, in the place of the working directory
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise UserError(f"model.builder: {module_name} cannot be imported: {in_one_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        what = "has no function" if found is None else f"has a {type(found).__name__}, which is no function, named"
        raise UserError(f"model.builder: {module_name} {what} {function!r}")
    builder: Builder = found
    return builder


def call_builder(path: str, builder: Builder, inputs: ModelInputs) -> nn.Module:
    """Return the user's model around the tables.

    Raises:
        UserError: the builder raises an error, returns something else than a module, or the module does not hold the
            tables exactly once, or holds others before them, or has parameters whose sizes are not known yet.
    """
    try:
        model = builder(inputs)
    except (Exception, SystemExit) as error:
        raise UserError(f"model.builder: {path} failed: {in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.builder: {path} returned {type(model).__name__}; it must return a torch.nn.Module")
    for name in ("embedding_bag_collection", "embedding_collection"):
        if (tables := getattr(inputs, name)) is not None:
            _check_place(path, model, name, tables)
    lazy = [name for name, each in chain(model.named_parameters(), model.named_buffers()) if is_lazy(each)]
    if lazy:
        raise UserError(
            f"model.builder: {lazy[0]} of what {path} returned has no size before the first forward; give layers their "
            "sizes instead of nn.Lazy modules: they are len(inputs.dense_features) and inputs.embedding_dims"
        )
    return model


def _check_place(path: str, model: nn.Module, name: str, tables: nn.Module) -> None:
    places = [place for place, module in model.named_modules(remove_duplicate=False) if module is tables]
    if model is tables or not places:
        problem = "is" if model is tables else "does not hold"
        raise UserError(
            f"model.builder: what {path} returned {problem} {name}; return a module that has it as an attribute"
        )
    if len(places) > 1:
        raise UserError(
            f"model.builder: what {path} returned holds {name} twice, as {' and '.join(places[:2])}; assign it to one "
            "attribute"
        )
    found = {holds_sequences(each): place for place, each in collections_of(model).items()}
    if (first := found[holds_sequences(tables)]) != places[0]:
        raise UserError(
            f"model.builder: what {path} returned holds another collection of tables, {first}, before {name}, "
            f"{places[0]}; assign {name} first"
        )


def in_one_line(error: BaseException) -> str:
    """Return the type and the message of an error of the user's code, and the line of that code, if it is known."""
    own_lines = [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]
    where = f" ({Path(own_lines[-1].filename).name}, line {own_lines[-1].lineno})" if own_lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300] + where


_LIBRARIES = tuple(Path(module.__file__ or "").parent for module in (torch, torchrec, mlet_dist, importlib))


def _is_users(file: str) -> bool:
    return not file.startswith("<") and not any(Path(file).is_relative_to(each) for each in _LIBRARIES)
