"""Warm start: a new run takes weights from a checkpoint or from `mlet factorize` instead of random ones."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.checkpoint.load import MODEL_KEY, CompleteCheckpoint, check_shapes, load_state, read_metadata
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.resume import checkpoint_at


@dataclass(frozen=True)
class InitialWeights:
    """A complete checkpoint that fits the model.

    Attributes:
        found: the checkpoint.
        has_dense: whether it holds the dense layers as well as the tables.
    """

    found: CompleteCheckpoint
    has_dense: bool

    def load(self, model: nn.Module) -> None:
        """Load the weights into ``model``, in any sharding on any number of ranks. A collective call.

        Raises:
            UserError: a tensor cannot be read.
        """
        state = model.state_dict()
        load_state({MODEL_KEY: self._covered(state)}, self.found.checkpoint.location)
        model.load_state_dict(state)

    def _covered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in state.items() if self.has_dense or name.startswith(TABLES_PREFIX)}


def find_initial_weights(config: Config, spec: ModelSpec) -> InitialWeights | None:
    """Return the weights at ``train.initial_weights``, checked against the model; None if null. A collective call.

    Both layers of each table are taken, and the dense layers if the checkpoint holds any. Optimizer state and the
    position in the data are not taken: the run starts at step 0.

    Raises:
        UserError: the checkpoint is incomplete, lacks a tensor of the model or holds one of another shape, or was
            trained with another vocabulary than the data set's.
    """
    path = config.train.initial_weights
    if path is None:
        return None
    found = checkpoint_at(path, "train.initial_weights")
    for line in found.damage:
        _log(f"warning: {line}; using the one before it")
    location, about = found.checkpoint.location, found.manifest.about
    metadata = read_metadata(location)
    stored = {name.removeprefix(f"{MODEL_KEY}.") for name in metadata.state_dict_metadata if name.startswith(MODEL_KEY)}
    initial = InitialWeights(found, has_dense=any(not name.startswith(TABLES_PREFIX) for name in stored))
    if spec.model.hidden_dim is None:
        for feature in spec.sparse:
            if f"{TABLES_PREFIX}projections.{feature.name}.weight" in stored:
                raise UserError(
                    f"{location}: table {feature.name!r} has two layers there and one in the model; "
                    "set model.hidden_dim"
                )
    wanted = initial._covered(build_dlrm(spec, torch.device("meta")).state_dict())
    check_shapes(wanted, metadata, location, MODEL_KEY)
    vocabulary_id = about["identity"]["the data set's vocabulary_id"] if "identity" in about else about["vocabulary_id"]
    if vocabulary_id is not None and vocabulary_id != spec.vocabulary_id:
        raise UserError(
            f"{location}: its rows belong to another vocabulary than that of {config.data.path}; prepare the "
            "data with the vocabulary that the tables were trained with"
        )
    parts = "tables and dense layers" if initial.has_dense else "tables"
    _log(f"starting with the {parts} of {location}")
    if vocabulary_id is None:
        _log(f"warning: {location} names no vocabulary; its rows must belong to the ids of {config.data.path}")
    return initial


def _log(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
