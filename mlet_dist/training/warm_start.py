"""Warm start: a new run takes weights from a checkpoint or from `mlet factorize` instead of random ones."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.checkpoint.load import MODEL_KEY, CompleteCheckpoint, check_shapes, load_state, read_metadata
from mlet_dist.config.config_file import Config
from mlet_dist.data.preprocessing import Preprocessing, find_difference
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.row_order import is_spread
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec, describe_bag
from mlet_dist.models.tables import tables_prefix
from mlet_dist.training.refitted_tables import RefittedTables, has_spread_rows
from mlet_dist.training.resume import DENSE_FEATURES, SPARSE_FEATURES, VOCABULARY_ID, checkpoint_at


@dataclass(frozen=True)
class InitialWeights:
    """A complete checkpoint that fits the model.

    Attributes:
        found: the checkpoint.
        has_dense: whether it holds the dense layers as well as the tables.
        tables: its tables, if their rows are not those of the model: where either has rows of several widths, or where
            they are stored by id.
        tables_prefix: of the names of the tables in the checkpoint.
    """

    found: CompleteCheckpoint
    has_dense: bool
    tables: RefittedTables | None = None
    tables_prefix: str = TABLES_PREFIX

    def load(self, model: nn.Module) -> None:
        """Load the weights into ``model``, in any sharding on any number of ranks. A collective call.

        Raises:
            UserError: a tensor cannot be read.
        """
        state = model.state_dict()
        load_state({MODEL_KEY: self._covered(state, tables_prefix(model))}, self.found.checkpoint.location)
        model.load_state_dict(state)
        if self.tables is not None:
            self.tables.load(model)

    def _covered(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return what is loaded by name, by its name in the checkpoint."""
        return {
            _renamed(name, prefix, self.tables_prefix): tensor
            for name, tensor in state.items()
            if (self.tables is None if name.startswith(prefix) else self.has_dense)
        }


def find_initial_weights(config: Config, spec: ModelSpec) -> InitialWeights | None:
    """Return the weights at ``train.initial_weights``, checked against the model; None if null. A collective call.

    Both layers of each table are taken, and the dense layers if the checkpoint holds any. Optimizer state and the
    position in the data are not taken: the run starts at step 0.

    Raises:
        UserError: the checkpoint is incomplete, lacks a tensor of the model or holds one of another shape, or its
            inputs are not those of the model: other columns or another order where dense layers are taken, another
            vocabulary, or columns that were made differently.
    """
    path = config.train.initial_weights
    if path is None:
        return None
    found = checkpoint_at(path, "train.initial_weights", "; `mlet factorize` makes one from the tables of an export")
    for line in found.damage:
        _log(f"warning: {line}; using the one before it")
    location, about = found.checkpoint.location, found.manifest.about
    metadata = read_metadata(location)
    stored = {name.removeprefix(f"{MODEL_KEY}.") for name in metadata.state_dict_metadata if name.startswith(MODEL_KEY)}
    refits, by_id = _changes_rows(about, spec), not is_spread(about) and has_spread_rows(spec)
    tables = RefittedTables.of_checkpoint(spec, found.checkpoint, found.manifest) if refits else None
    prefix, stored_prefix = spec.tables_prefix, (about.get("spec") or {}).get("tables_prefix", TABLES_PREFIX)
    has_dense = any(not name.startswith(stored_prefix) for name in stored)
    if spec.model.hidden_dim is None and not refits:
        for table in spec.tables:
            if f"{stored_prefix}projections.{table.name}.weight" in stored:
                raise UserError(
                    f"{location}: table {table.name!r} has two layers there and one in the model; set model.hidden_dim"
                )
    k, stored_k = spec.model.hidden_dim, about.get("identity", {}).get("model.hidden_dim")
    if not refits and k is not None and stored_k not in (None, k):
        raise UserError(
            f"{location}: model.hidden_dim was {stored_k} there and is {k}; without compression it must be the same: "
            f"set model.hidden_dim={stored_k}, or export that run and take `mlet factorize EXPORT --hidden-dim {k}`"
        )
    warnings = SourceInputs.of(about, str(location)).check(spec, config.data.path, dense_layers=has_dense)
    state = build_training_model(spec, torch.device("meta")).state_dict()
    wanted = {
        _renamed(name, prefix, stored_prefix): tensor
        for name, tensor in state.items()
        if (not refits if name.startswith(prefix) else has_dense)
    }
    check_shapes(wanted, metadata, location, MODEL_KEY)
    if by_id and tables is None:
        tables = RefittedTables.of_checkpoint(spec, found.checkpoint, found.manifest)
    parts = "tables and dense layers" if has_dense else "tables"
    _log(f"starting with the {parts} of {location}")
    for line in warnings:
        _log(f"warning: {location}: {line}")
    return InitialWeights(found, has_dense, tables, stored_prefix)


def _renamed(name: str, prefix: str, stored_prefix: str) -> str:
    """Return the name in a checkpoint of a tensor of the model, whose tables may have another prefix there."""
    return f"{stored_prefix}{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def _changes_rows(about: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Return whether the model, or that of a checkpoint, has rows of several widths."""
    return bool(spec.row_ranges or (about.get("spec") or {}).get("row_ranges"))


@dataclass(frozen=True)
class SourceInputs:
    """What is known of the inputs that weights were trained on; tables of another program name none.

    Attributes:
        location: of the weights, for messages.
        dense, sparse: the names of the dense columns and of the sparse features, in order, if known.
        features: the sparse features, by name, if known.
        preprocessing: how they were made, if known.
        vocabulary_id: of the vocabularies of the whole data set, if known.
    """

    location: str
    dense: tuple[str, ...] | None = None
    sparse: tuple[str, ...] | None = None
    features: Mapping[str, SparseFeature] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    vocabulary_id: str | None = None

    @classmethod
    def of(cls, about: Mapping[str, Any], location: str) -> "SourceInputs":
        """Return what the manifest of a run's checkpoint, or of factors, records."""
        if about.get("spec") is not None:
            spec = ModelSpec.from_dict(about["spec"], location)
            features = {feature.name: feature for feature in spec.sparse}
            return cls(location, spec.dense, tuple(features), features, spec.preprocessing, spec.vocabulary_id)
        if "identity" in about:  # a run's checkpoint of a version that saved no spec with it
            identity = about["identity"]
            dense, sparse = (tuple(identity[key]) for key in (DENSE_FEATURES, SPARSE_FEATURES))
            return cls(location, dense, sparse, vocabulary_id=identity[VOCABULARY_ID])
        return cls(location)

    def check(self, spec: ModelSpec, data: str, *, dense_layers: bool) -> list[str]:
        """Return warnings on what may be different on purpose, or cannot be compared.

        Args:
            spec: the model to start.
            data: its data set, for messages.
            dense_layers: whether dense layers are taken; they need the inputs that they had, made as before.

        Raises:
            UserError: dense layers would get other inputs or the same in another order, ids belong to another
                vocabulary, or a column was made differently.
        """
        if dense_layers:
            self._check_columns(spec)
        warnings = []
        if dense_layers and self.dense is None:
            warnings.append(
                "names no columns, and its dense layers take them by position: they must have been trained on "
                f"{', '.join(spec.dense) or 'no dense columns'}; {', '.join(each.name for each in spec.sparse)}"
            )
        now, before = spec.preprocessing, self.preprocessing
        if now is None or before is None:
            return warnings + self._check_vocabulary(spec, data, dense_layers=dense_layers)
        here, there = f"in {data}", "where the weights were trained"
        names = [feature.name for feature in spec.sparse if feature.name in before.sparse]
        inputs = replace(before.select(spec.dense if dense_layers else (), names), label=now.label)
        difference = find_difference(now, inputs, here, there)
        if difference is not None:
            raise UserError(f"{self.location}: {difference.text}; {difference.remedy}")
        label = find_difference(now, before.select((), ()), here, there) if dense_layers else None
        if label is not None:
            warnings.append(f"{label.text}; training goes on with the labels of {data}")
        return warnings

    def _check_columns(self, spec: ModelSpec) -> None:
        names = tuple(feature.name for feature in spec.sparse)
        for key, before, now in ((DENSE_FEATURES, self.dense, spec.dense), (SPARSE_FEATURES, self.sparse, names)):
            if before is not None and before != now:
                raise UserError(
                    f"{self.location}: its dense layers take their inputs by position, and {key} was "
                    f"{to_json(before)}, is {to_json(now)}; set {key}=[{','.join(before)}]"
                )
        for feature in spec.sparse:
            old = self.features.get(feature.name, feature)
            if (old.multi_valued, old.weighted) != (feature.multi_valued, feature.weighted):
                raise UserError(
                    f"{self.location}: its dense layers were trained where feature {feature.name!r} holds "
                    f"{describe_bag(old)}; in the data set it holds {describe_bag(feature)}; prepare it in the same way"
                )

    def _check_vocabulary(self, spec: ModelSpec, data: str, *, dense_layers: bool) -> list[str]:
        """Compare the vocabularies of whole data sets, where nothing else is known; return warnings."""
        if self.vocabulary_id is None:
            return [f"names no vocabulary; its rows must belong to the ids of {data}"]
        if self.vocabulary_id != spec.vocabulary_id:
            raise UserError(
                f"{self.location}: its rows belong to another vocabulary than that of {data}; prepare the data with "
                "the vocabulary that the tables were trained with"
            )
        if not dense_layers or not spec.dense:
            return []
        return [
            "does not record how its dense columns were made, so that they cannot be compared with those of "
            f"{data}; they must have been made in the same way"
        ]


def _log(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
