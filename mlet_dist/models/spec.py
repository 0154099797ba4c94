"""The description of a model, from which it is built again without its data set; checkpoints and exports store it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.parser import parse_section
from mlet_dist.config.table_settings import TableSettings
from mlet_dist.data.preprocessing import LIKE_REMEDY, Preprocessing, extends, find_difference
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.formatting import load_json

ONE_LABEL = ("label",)
"""The labels of a model of one, whatever its column is called."""

TABLES_PREFIX = "sparse_arch.embedding_bag_collection."
"""What TorchRec's models, and all that ``model.name`` offers, call their tables in the state dict."""

BAG_ROWS, SEQUENCE_ROWS = "embedding_bags", "embeddings"
"""What TorchRec's collections of pooled vectors and of sequences call their tables."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A table of a model, the features that look rows of it up, and its sizes and initial values.

    The vectors of a ``sequence`` table are not pooled.
    """

    name: str
    num_embeddings: int
    features: tuple[SparseFeature, ...]
    settings: TableSettings
    sequence: bool = False

    @property
    def embedding_dim(self) -> int:
        """d."""
        return self.settings.embedding_dim

    @property
    def hidden_dim(self) -> int | None:
        """k; None for a single-layer table."""
        return self.settings.hidden_dim

    @property
    def takes_mean(self) -> bool:
        """Whether bags are pooled by their mean; for single ids it equals the sum, which is cheaper."""
        return self.settings.pooling == "mean" and self.multi_valued and not self.sequence

    @property
    def multi_valued(self) -> bool:
        """Whether any of the features holds lists of ids."""
        return any(feature.multi_valued for feature in self.features)

    @property
    def pooling_factor(self) -> float:
        """The average number of ids per bag, over all features."""
        return sum(feature.pooling_factor for feature in self.features) / len(self.features)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes, inputs and seed of a model.

    Attributes:
        model: layer sizes and initial values; those of tables that ``table_settings`` does not have.
        dense: names of the dense inputs, in order.
        sparse: categorical inputs, in order.
        seed: fixes the initial values.
        vocabulary_id: identifies the vocabularies of the whole data set.
        preprocessing: how the label and the inputs were made; None in a model of a version that did not record it.
        zero_first_rows: the tables whose row 0 no training row looks up; it is zero.
        row_ranges: by table, the rows, width and expected share of lookups of ranges of rows of different widths
            (``embeddings.row_ranges``); the rows of other tables all have hidden_dim columns.
        shared_rows: whether rows of width 0 read a row of their table that they share, instead of zero.
        tables_prefix: of ``embedding_bags.<table>.weight`` and ``projections.<table>.weight`` in the state dict.
        sequences_prefix: of ``embeddings.<table>.weight`` and ``projections.<table>.weight`` of tables of sequences.
        labels: the names of the labels that it predicts; ``label`` if there is one.
        adaptive: the fields of ``embeddings.row_moves.AdaptiveRows`` if rows of the tables with row ranges move
            between widths while they train; else empty.
        table_settings: the sizes and initial values of the tables that differ from those of ``model`` for all tables,
            as its rules and patterns gave them for the numbers of rows of the data set.
    """

    model: ModelConfig
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    seed: int
    vocabulary_id: str = ""
    preprocessing: Preprocessing | None = None
    zero_first_rows: tuple[str, ...] = ()
    row_ranges: Mapping[str, tuple[tuple[int, int, float], ...]] = field(default_factory=dict)
    adaptive: Mapping[str, Any] = field(default_factory=dict)
    shared_rows: bool = False
    tables_prefix: str = TABLES_PREFIX
    table_settings: Mapping[str, TableSettings] = field(default_factory=dict)
    sequences_prefix: str = ""
    labels: tuple[str, ...] = ONE_LABEL

    @classmethod
    def of(cls, config: Config, schema: DatasetSchema) -> "ModelSpec":
        """Return the spec of the model that ``config`` describes for a data set with ``schema``.

        Raises:
            UserError: a requested feature is not in the data set, or ``model.tables``, ``sharding.tables`` or
                ``compression.tables`` names an unknown table, or as for ``with_model``.
        """
        features = {feature.name: feature for feature in schema.sparse}
        config.check_features(schema.dense, list(features))
        dense = schema.dense if config.data.dense_features is None else config.data.dense_features
        wanted = tuple(features) if config.data.sparse_features is None else config.data.sparse_features
        sparse = tuple(features[name] for name in wanted)
        config.check_tables(list(dict.fromkeys(feature.table_name for feature in sparse)))
        preprocessing = schema.preprocessing.select(dense, wanted)
        tables = {feature.table_name for feature in sparse}
        zero = tuple(name for name in schema.untrained_first_rows if name in tables)
        spec = cls(
            *(config.model, dense, sparse, config.train.seed, schema.vocabulary_id, preprocessing, zero),
            labels=_labels_of(schema),
        )
        return spec.with_model(config)

    def with_model(self, config: Config) -> "ModelSpec":
        """Return the spec with the model of a config, whose settings of single tables are applied to these tables.

        Raises:
            UserError: a feature has weights, and a table takes the mean; ``model.sequences`` names an unknown feature
                or one with weights, or comes with compression; or as for ``Config.table_settings``.
        """
        check_sequences(config.model, self.sparse)
        if config.model.sequences is not None and config.compression.policy != "none":
            raise UserError(
                f"compression.policy is {config.compression.policy}, but tables of model.sequences cannot be "
                "compressed; use none"
            )
        found = config.table_settings({feature.table_name: feature.num_embeddings for feature in self.sparse})
        own = {name: each for name, each in found.items() if each != config.model.of_all_tables}
        spec = dataclasses.replace(self, model=config.model, table_settings=own)
        weighted = [feature.name for feature in self.sparse if feature.weighted]
        mean = [table.name for table in spec.tables if table.takes_mean]
        if weighted and mean:
            key = f"the pooling of table {mean[0]!r}" if config.model.pooling == "sum" else "model.pooling"
            raise UserError(f"{key} is mean, but feature {weighted[0]!r} has weights, which need sum pooling; use sum")
        return spec

    def with_hidden_dim(self, hidden_dim: int | None) -> "ModelSpec":
        """Return the spec with k of all tables; None for single-layer tables."""
        own = {name: dataclasses.replace(each, hidden_dim=hidden_dim) for name, each in self.table_settings.items()}
        model = dataclasses.replace(self.model, hidden_dim=hidden_dim)
        return dataclasses.replace(self, model=model, table_settings=own)

    def with_embedding_dim(self, embedding_dim: int) -> "ModelSpec":
        """Return the spec of the same network with another d of all tables, trained at one width."""
        own = {
            name: dataclasses.replace(each, embedding_dim=embedding_dim) for name, each in self.table_settings.items()
        }
        model = dataclasses.replace(self.model, embedding_dim=embedding_dim, nested_dims=None, nested_loss="all")
        return dataclasses.replace(self, model=model, table_settings=own)

    @property
    def embedding_dims(self) -> dict[str, int]:
        """d of each table."""
        return {table.name: table.embedding_dim for table in self.tables}

    @property
    def is_weighted(self) -> bool:
        """Whether batches carry a weight for each id."""
        return any(feature.weighted for feature in self.sparse)

    @property
    def pooling_factors(self) -> dict[str, float]:
        """The average number of ids per bag of each table, over the training split of the model's data set."""
        return {table.name: table.pooling_factor for table in self.tables}

    @property
    def tables(self) -> tuple["EmbeddingTable", ...]:
        """The embedding tables, in the order of their first features."""
        found: dict[str, list[SparseFeature]] = {}
        for feature in self.sparse:
            found.setdefault(feature.table_name, []).append(feature)
        of_all, sequences = self.model.of_all_tables, set(self.model.sequences or ())
        return tuple(
            EmbeddingTable(
                name,
                of[0].num_embeddings,
                tuple(of),
                self.table_settings.get(name, of_all),
                any(each.name in sequences for each in of),
            )
            for name, of in found.items()
        )

    @property
    def sequence_tables(self) -> frozenset[str]:
        """The names of the tables whose features are sequences."""
        return frozenset(table.name for table in self.tables if table.sequence)

    @property
    def table_prefixes(self) -> tuple[str, ...]:
        """The prefixes of all names of tables in the state dict, for ``str.startswith``."""
        return tuple(filter(None, (self.tables_prefix, self.sequences_prefix)))

    def prefix_of(self, table: str) -> str:
        """Return the prefix of the names of a table or pool in the state dict."""
        return self.sequences_prefix if table in self.sequence_tables else self.tables_prefix

    def rows_name(self, table: str) -> str:
        """Return the name in the state dict of W1 of a table or pool, or of W in the served model."""
        rows = SEQUENCE_ROWS if table in self.sequence_tables else BAG_ROWS
        return f"{self.prefix_of(table)}{rows}.{table}.weight"

    def check_data(self, schema: DatasetSchema, path: object) -> str | None:
        """Check that a data set has the inputs of this model, made in the same way, and the same kind of label.

        Its vocabularies may have grown from those of the model's data set, or these from its own. Ids that the model
        does not know then read row 0 (``known_ids``).

        Args:
            schema: the data set's schema.
            path: its location, for messages.

        Returns:
            A warning if this model does not record how its inputs were made, so that only its ids were checked.

        Raises:
            UserError: an input is missing or of another kind, or has another meaning.
        """
        if self.labels != _labels_of(schema):
            raise UserError(
                f"{path}: has {_named(_labels_of(schema))}, and the model predicts {_named(self.labels)}; prepare the "
                "data set with the labels of the model"
            )
        for name in self.dense:
            if name not in schema.dense:
                raise UserError(f"{path}: the model takes the dense column {name!r}, which this data set lacks")
        self._check_sizes(schema, path)
        return self._check_meaning(schema, path, self.preprocessing)

    def check_ids(self, schema: DatasetSchema, path: object) -> None:
        """Check, as ``check_data`` does, the sparse features alone."""
        self._check_sizes(schema, path)
        made = self.preprocessing
        self._check_meaning(schema, path, made and Preprocessing(schema.preprocessing.label, {}, made.sparse))

    def _check_sizes(self, schema: DatasetSchema, path: object) -> None:
        for feature in self.sparse:
            found = next((each for each in schema.sparse if each.name == feature.name), None)
            if found is None:
                raise UserError(f"{path}: the model takes the feature {feature.name!r}, which this data set lacks")
            if found.num_embeddings != feature.num_embeddings and not self._has_grown(schema, feature.name):
                raise UserError(
                    f"{path}: feature {feature.name!r} has {found.num_embeddings:,} ids here, but the model's table "
                    f"has {feature.num_embeddings:,} rows; {LIKE_REMEDY}"
                )
            if (found.multi_valued, found.weighted) != (feature.multi_valued, feature.weighted):
                raise UserError(
                    f"{path}: feature {feature.name!r} holds {describe_bag(found)} here and {describe_bag(feature)} in "
                    "the model's data set; prepare both data sets in the same way"
                )

    def _has_grown(self, schema: DatasetSchema, feature: str) -> bool:
        """Return whether the feature's vocabulary has grown from the model's to that of a data set, or back."""
        if self.preprocessing is None:
            return self.vocabulary_id in schema.extends
        here, own = schema.preprocessing.sparse[feature], self.preprocessing.sparse[feature]
        return extends(here, own) or extends(own, here)

    def known_ids(self, schema: DatasetSchema) -> dict[str, int]:
        """Return the number of ids that the model knows of features of which a data set, which fits it, has more."""
        sizes = schema.num_embeddings
        return {each.name: each.num_embeddings for each in self.sparse if sizes[each.name] > each.num_embeddings}

    def _check_meaning(self, schema: DatasetSchema, path: object, wanted: Preprocessing | None) -> str | None:
        if wanted is None:
            if self.vocabulary_id not in (schema.vocabulary_id, *schema.extends):
                raise UserError(
                    f"{path}: its ids belong to another vocabulary than those of the model's data set; {LIKE_REMEDY}"
                )
            return (
                f"the model does not record how its dense columns and its label were made, so that they cannot be "
                f"compared with those of {path}; they must have been made in the same way"
            )
        difference = find_difference(schema.preprocessing, wanted, "here", "in the model's data set", "either")
        if difference is not None:
            raise UserError(f"{path}: {difference.text}; {difference.remedy}")
        return None

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        plain["preprocessing"] = self.preprocessing and self.preprocessing.to_dict()
        if not self.row_ranges:
            del plain["row_ranges"]
        if not self.shared_rows:
            del plain["shared_rows"]
        if not self.adaptive:
            del plain["adaptive"]
        if self.tables_prefix == TABLES_PREFIX:
            del plain["tables_prefix"]
        if not self.sequences_prefix:
            del plain["sequences_prefix"]
        if self.labels == ONE_LABEL:
            del plain["labels"]
        if not self.table_settings:
            del plain["table_settings"]
        return plain

    @classmethod
    def load(cls, path: Path) -> "ModelSpec":
        """Read a spec that ``save`` wrote.

        Raises:
            UserError: the file is missing or invalid.
        """
        try:
            return cls.from_dict(load_json(path), str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None

    @classmethod
    def from_dict(cls, plain: dict[str, Any], source: str) -> "ModelSpec":
        """Build a spec from the result of ``to_dict``; ``source`` is the file to name in messages.

        Raises:
            UserError: ``plain`` is not a valid spec.
        """
        try:
            features = tuple(
                SparseFeature(
                    each["name"],
                    int(each["num_embeddings"]),
                    bool(each["multi_valued"]),
                    bool(each["weighted"]),
                    float(each["pooling_factor"]),
                    str(each.get("table", "")),
                )
                for each in plain["sparse"]
            )
            model = parse_section(ModelConfig, plain["model"], "model.", source)
            made = plain.get("preprocessing")
            return cls(
                model,
                tuple(plain["dense"]),
                features,
                int(plain["seed"]),
                str(plain["vocabulary_id"]),
                None
                if made is None
                else Preprocessing.from_dict(made).select(plain["dense"], (f.name for f in features)),
                tuple(plain.get("zero_first_rows", ())),
                {
                    str(name): tuple((int(rows), int(width), float(share)) for rows, width, share in ranges)
                    for name, ranges in plain.get("row_ranges", {}).items()
                },
                dict(plain.get("adaptive", {})),
                bool(plain.get("shared_rows", False)),
                str(plain.get("tables_prefix", TABLES_PREFIX)),
                {str(name): TableSettings(**each) for name, each in plain.get("table_settings", {}).items()},
                str(plain.get("sequences_prefix", "")),
                tuple(map(str, plain.get("labels", ONE_LABEL))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a model description: {error!r}") from None


def check_sequences(model: ModelConfig, sparse: Sequence[SparseFeature]) -> None:
    """Raise UserError if ``model.sequences`` names a feature that the model does not have, or one with weights."""
    features = {feature.name: feature for feature in sparse}
    for name in model.sequences or ():
        if name not in features:
            raise UserError(f"model.sequences: the model has no feature {name!r}; it has {', '.join(features)}")
    tables = {features[name].table_name for name in model.sequences or ()}
    for feature in sparse:
        if feature.weighted and feature.table_name in tables:
            raise UserError(
                f"model.sequences: feature {feature.name!r} has weights, which only pooled vectors have; leave it out"
            )


def _labels_of(schema: DatasetSchema) -> tuple[str, ...]:
    return schema.labels if schema.more_labels else ONE_LABEL


def _named(labels: tuple[str, ...]) -> str:
    return "one label" if len(labels) == 1 else f"the labels {', '.join(labels)}"


def describe_bag(feature: SparseFeature) -> str:
    """Return what a row of a feature holds, for messages."""
    if not feature.multi_valued:
        return "one id a row"
    return "lists of ids with weights" if feature.weighted else "lists of ids without weights"
