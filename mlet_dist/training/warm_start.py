"""Weights that a run begins with instead of random ones."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.checkpoint.load import MODEL_KEY, CompleteCheckpoint, check_shapes, load_state, read_metadata
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.resume import checkpoint_at


@dataclass(frozen=True)
class InitialWeights:
    """A whole checkpoint that fits the model.

    Attributes:
        found: the checkpoint.
        has_dense: whether it holds the dense layers too, and not tables alone.
    """

    found: CompleteCheckpoint
    has_dense: bool

    def load(self, model: nn.Module) -> None:
        """Fill ``model``, sharded in any way on any number of ranks. A collective call.

        Raises:
            UserError: a tensor cannot be read.
        """
        state = model.state_dict()
        load_state({MODEL_KEY: self._held(state)}, self.found.checkpoint.location)
        model.load_state_dict(state)

    def _held(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in state.items() if self.has_dense or name.startswith(TABLES_PREFIX)}


def find_initial_weights(config: Config, spec: ModelSpec) -> InitialWeights | None:
    """What ``train.initial_weights`` names, checked against the model; None where it is null. A collective call.

    Taken are both layers of each table, and the dense layers where it holds any; no optimizer's state and no position
    in the data, so the run begins at step 0.

    Raises:
        UserError: it is not whole, lacks a tensor of the model or holds one of another shape, or its ids mean other
            values than the data set's.
    """
    path = config.train.initial_weights
    if path is None:
        return None
    found = checkpoint_at(path, "train.initial_weights")
    for line in found.damage:
        _say(f"warning: {line}; the one before it is taken")
    location, about = found.checkpoint.location, found.manifest.about
    metadata = read_metadata(location)
    held = {name.removeprefix(f"{MODEL_KEY}.") for name in metadata.state_dict_metadata if name.startswith(MODEL_KEY)}
    initial = InitialWeights(found, has_dense=any(not name.startswith(TABLES_PREFIX) for name in held))
    if spec.model.hidden_dim is None:
        for feature in spec.sparse:
            if f"{TABLES_PREFIX}projections.{feature.name}.weight" in held:
                raise UserError(
                    f"{location}: table {feature.name!r} is in two layers there and in one in the model; set "
                    "model.hidden_dim"
                )
    wanted = initial._held(build_dlrm(spec, torch.device("meta")).state_dict())
    check_shapes(wanted, metadata, location, MODEL_KEY)
    vocabulary_id = about["identity"]["the data set's vocabulary_id"] if "identity" in about else about["vocabulary_id"]
    if vocabulary_id is not None and vocabulary_id != spec.vocabulary_id:
        raise UserError(
            f"{location}: its rows are of other values than the ids of {config.data.path}; prepare the data with the "
            "vocabulary of the model that the tables came from"
        )
    parts = "tables and dense layers" if initial.has_dense else "tables"
    _say(f"begins with the {parts} of {location}")
    if vocabulary_id is None:
        _say(f"warning: {location} does not say what its rows are of; they must be of the ids of {config.data.path}")
    return initial


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
