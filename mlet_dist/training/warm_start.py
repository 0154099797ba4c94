"""Warm start: a new run takes weights from a checkpoint or from `mlet factorize` instead of random ones."""

import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.checkpoint.load import MODEL_KEY, CompleteCheckpoint, check_shapes, load_state, read_metadata
from mlet_dist.config.config_file import Config
from mlet_dist.embeddings.row_order import is_spread
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.stored_tables.table_source import projection_name
from mlet_dist.training.refitted_tables import RefittedTables, has_spread_rows
from mlet_dist.training.resume import checkpoint_at
from mlet_dist.training.source_inputs import SourceInputs, describe_growth


@dataclass(frozen=True)
class InitialWeights:
    """A complete checkpoint that fits the model.

    Attributes:
        found: the checkpoint.
        has_dense: whether it holds the dense layers as well as the tables.
        tables: its tables, if their rows are not those of the model: where either has rows of several widths, where
            they are stored by id, or where vocabularies have grown since.
        prefixes: by the prefix of the names of the model's tables, that of the checkpoint's.
    """

    found: CompleteCheckpoint
    has_dense: bool
    tables: RefittedTables | None
    prefixes: Mapping[str, str]

    def load(self, model: nn.Module) -> None:
        """Load the weights into ``model``, in any sharding on any number of ranks. A collective call.

        Raises:
            UserError: a tensor cannot be read.
        """
        state = model.state_dict()
        load_state({MODEL_KEY: self._covered(state)}, self.found.checkpoint.location)
        model.load_state_dict(state)
        if self.tables is not None:
            self.tables.load(model)

    def _covered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is loaded by name, by its name in the checkpoint."""
        return {
            _renamed(name, self.prefixes): tensor
            for name, tensor in state.items()
            if (self.tables is None if name.startswith(tuple(self.prefixes)) else self.has_dense)
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
    inputs = SourceInputs.of(about, str(location))
    grown = inputs.grown_tables(spec)
    stored = {name.removeprefix(f"{MODEL_KEY}.") for name in metadata.state_dict_metadata if name.startswith(MODEL_KEY)}
    refits, by_id = _changes_rows(about, spec), not is_spread(about) and has_spread_rows(spec)
    there = about.get("spec") or {}
    prefixes = {spec.tables_prefix: there.get("tables_prefix", TABLES_PREFIX)}
    if spec.sequences_prefix:
        prefixes[spec.sequences_prefix] = there.get("sequences_prefix", spec.sequences_prefix)
    has_dense = any(not name.startswith(tuple(prefixes.values())) for name in stored)
    relayered = () if refits else _relayered_tables(spec, about, stored, prefixes, str(location))
    refits = refits or bool(relayered)
    warnings = inputs.check(spec, config.data.path, dense_layers=has_dense)
    state = build_training_model(spec, torch.device("meta")).state_dict()
    wanted = {
        _renamed(name, prefixes): tensor
        for name, tensor in state.items()
        if (not refits if name.startswith(tuple(prefixes)) else has_dense)
    }
    grown_rows = {_renamed(spec.rows_name(name), prefixes): rows for name, rows in grown.items()}
    # Opened first where rows change, since it can say more of them than the shapes of other layers do.
    tables = RefittedTables.of_checkpoint(spec, found.checkpoint, found.manifest, grown) if refits else None
    check_shapes(wanted, metadata, location, MODEL_KEY, grown_rows)
    if tables is None and (by_id or grown):
        tables = RefittedTables.of_checkpoint(spec, found.checkpoint, found.manifest, grown)
    parts = "tables and dense layers" if has_dense else "tables"
    layers = f"; {', '.join(relayered)}: one layer there and two in the model, or the reverse" if relayered else ""
    _log(f"starting with the {parts} of {location}{describe_growth(grown, spec)}{layers}")
    for line in warnings:
        _log(f"warning: {location}: {line}")
    return InitialWeights(found, has_dense, tables, prefixes)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Return the name in a checkpoint of a tensor of the model, whose tables may have another prefix there."""
    for prefix, stored in prefixes.items():
        if name.startswith(prefix):
            return f"{stored}{name.removeprefix(prefix)}"
    return name


def _changes_rows(about: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Return whether the model, or that of a checkpoint, has rows of several widths."""
    return bool(spec.row_ranges or (about.get("spec") or {}).get("row_ranges"))


def _relayered_tables(
    spec: ModelSpec, about: Mapping[str, Any], stored: Collection[str], prefixes: Mapping[str, str], location: str
) -> tuple[str, ...]:
    """Return the tables that have one layer in a checkpoint and two in the model, or the reverse.

    A table that has grown may have got its second layer by that, or the rule may be new (``single_layer_up_to``).

    Args:
        spec: the model.
        about: of the checkpoint's manifest.
        stored: the names of its tensors.
        prefixes: by that of the model's tables, the prefix of its tables.
        location: of it, for messages.

    Raises:
        UserError: the model has no second layers at all, or a table's k is another.
    """
    found: list[str] = []
    before = _hidden_dims(about, spec, location)
    for table in spec.tables:
        two_layers = _renamed(projection_name(spec.prefix_of(table.name), table.name), prefixes) in stored
        if two_layers and not spec.model.has_two_layers:
            raise UserError(
                f"{location}: table {table.name!r} has two layers there and one in the model; set model.hidden_dim"
            )
        k, stored_k = table.hidden_dim, before.get(table.name)
        if two_layers and None not in (k, stored_k) and k != stored_k:
            if "identity" not in about:
                return ()  # the shapes of factors say it
            key = f"model.tables.{table.name}.hidden_dim" if table.name in spec.table_settings else "model.hidden_dim"
            raise UserError(
                f"{location}: {key} was {stored_k} there and is {k}; without compression it must be the same: "
                f"set {key}={stored_k}, or export that run and take `mlet factorize EXPORT --hidden-dim {k}`"
            )
        if two_layers != (k is not None) and _renamed(spec.rows_name(table.name), prefixes) in stored:
            found.append(table.name)
    return tuple(found)


def _hidden_dims(about: Mapping[str, Any], spec: ModelSpec, location: str) -> dict[str, int | None]:
    """Return k of the tables of a checkpoint."""
    if about.get("spec") is not None:
        return {table.name: table.hidden_dim for table in ModelSpec.from_dict(about["spec"], location).tables}
    if "factorized" in about:
        return {each["name"]: each["hidden_dim"] for each in about["factorized"]["tables"]}
    # A version that saved no spec knew one k.
    return dict.fromkeys(spec.embedding_dims, about.get("identity", {}).get("model.hidden_dim"))


def _log(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
