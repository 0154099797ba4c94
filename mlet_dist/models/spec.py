"""The description of a model, from which it is built again without its data set; checkpoints and exports store it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import parse_section
from mlet_dist.config.sections import ModelConfig
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.errors import UserError


@dataclass(frozen=True)
class ModelSpec:
    """Sizes, inputs and seed of a DLRM.

    Attributes:
        model: layer sizes and initial values.
        dense: names of the dense inputs, in order.
        sparse: categorical inputs, in order; each has a table of its own name.
        seed: fixes the initial values.
        vocabulary_id: identifies the data set's vocabulary, which gives the ids their meaning.
        zero_first_rows: the inputs whose id 0 no training row has; row 0 of their tables is zero.
    """

    model: ModelConfig
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    seed: int
    vocabulary_id: str = ""
    zero_first_rows: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config, schema: DatasetSchema) -> "ModelSpec":
        """Return the spec of the model that ``config`` describes for a data set with ``schema``.

        Raises:
            UserError: a requested feature is not in the data set, or has weights although pooling is mean, or
                ``sharding.tables`` names an unknown table.
        """
        features = {feature.name: feature for feature in schema.sparse}
        config.check_features(schema.dense, list(features))
        dense = schema.dense if config.data.dense_features is None else config.data.dense_features
        wanted = tuple(features) if config.data.sparse_features is None else config.data.sparse_features
        config.check_tables(wanted)
        sparse = tuple(features[name] for name in wanted)
        weighted = [feature.name for feature in sparse if feature.weighted]
        if weighted and config.model.pooling == "mean":
            raise UserError(
                f"model.pooling is mean, but feature {weighted[0]!r} has weights, which need sum pooling; use sum"
            )
        zero = tuple(name for name in wanted if name in schema.untrained_first_rows)
        return cls(config.model, dense, sparse, config.train.seed, schema.vocabulary_id, zero)

    @property
    def is_weighted(self) -> bool:
        """Whether batches carry a weight for each id."""
        return any(feature.weighted for feature in self.sparse)

    @property
    def pooling_factors(self) -> dict[str, float]:
        """The average number of ids per bag of each table, over the training split of the model's data set."""
        return {feature.name: feature.pooling_factor for feature in self.sparse}

    def check_data(self, schema: DatasetSchema, path: object) -> None:
        """Check that a data set has the inputs of this model, with the same vocabulary.

        Args:
            schema: the data set's schema.
            path: its location, for messages.

        Raises:
            UserError: an input is missing or of another kind, or ids have another meaning.
        """
        for name in self.dense:
            if name not in schema.dense:
                raise UserError(f"{path}: the model takes the dense column {name!r}, which this data set lacks")
        for feature in self.sparse:
            found = next((each for each in schema.sparse if each.name == feature.name), None)
            if found is None:
                raise UserError(f"{path}: the model takes the feature {feature.name!r}, which this data set lacks")
            if found.num_embeddings != feature.num_embeddings:
                raise UserError(
                    f"{path}: feature {feature.name!r} has {found.num_embeddings:,} ids here, but the model's table "
                    f"has {feature.num_embeddings:,} rows; use the data set that the model was trained on, or one with "
                    "the same vocabulary"
                )
            if (found.multi_valued, found.weighted) != (feature.multi_valued, feature.weighted):
                raise UserError(
                    f"{path}: feature {feature.name!r} holds {_bag(found)} here and {_bag(feature)} in the model's "
                    "data set; prepare both data sets in the same way"
                )

        if schema.vocabulary_id != self.vocabulary_id:
            raise UserError(
                f"{path}: its ids belong to another vocabulary than those of the model's data set; prepare both data "
                "sets with the same vocabulary"
            )

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def load(cls, path: Path) -> "ModelSpec":
        """Read a spec that ``save`` wrote.

        Raises:
            UserError: the file is missing or invalid.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
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
                )
                for each in plain["sparse"]
            )
            model = parse_section(ModelConfig, plain["model"], "model.", source)
            zero = tuple(plain.get("zero_first_rows", ()))
            return cls(model, tuple(plain["dense"]), features, int(plain["seed"]), str(plain["vocabulary_id"]), zero)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a model description: {error!r}") from None


def _bag(feature: SparseFeature) -> str:
    if not feature.multi_valued:
        return "one id a row"
    return "lists of ids with weights" if feature.weighted else "lists of ids without weights"
