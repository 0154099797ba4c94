"""What a model was built from: enough to build it again without its data set."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.config.parser import parse_section
from mlet_dist.config.sections import Config, ModelConfig
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
        vocabulary_id: of the data set; what the ids mean.
    """

    model: ModelConfig
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    seed: int
    vocabulary_id: str = ""

    @classmethod
    def of(cls, config: Config, schema: DatasetSchema) -> "ModelSpec":
        """The model that ``config`` asks for on the data set ``schema``.

        Raises:
            UserError: a feature that is asked for is not in the data set, or has weights and is to be pooled by mean;
                or ``sharding.tables`` names another table.
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
                f"model.pooling is mean, but feature {weighted[0]!r} has weights, by which vectors are added up; "
                "use sum"
            )
        return cls(config.model, dense, sparse, config.train.seed, schema.vocabulary_id)

    @property
    def is_weighted(self) -> bool:
        """Whether batches carry a weight for each id."""
        return any(feature.weighted for feature in self.sparse)

    @property
    def pooling_factors(self) -> dict[str, float]:
        """Ids a bag of each table, on average over the training split of the data set that the model is of."""
        return {feature.name: feature.pooling_factor for feature in self.sparse}

    def check_data(self, schema: DatasetSchema, path: object) -> None:
        """Raise UserError unless the data set at ``path`` holds this model's inputs, with ids that its tables have."""
        for name in self.dense:
            if name not in schema.dense:
                raise UserError(f"{path}: the model takes the dense column {name!r}, which this data set lacks")
        for feature in self.sparse:
            found = next((each for each in schema.sparse if each.name == feature.name), None)
            if found is None:
                raise UserError(f"{path}: the model takes the feature {feature.name!r}, which this data set lacks")
            if found.num_embeddings != feature.num_embeddings:
                raise UserError(
                    f"{path}: feature {feature.name!r} has {found.num_embeddings:,} ids here and the model's table "
                    f"{feature.num_embeddings:,} rows; use the data set that the model was trained on, or one with the "
                    "same vocabulary"
                )
            if (found.multi_valued, found.weighted) != (feature.multi_valued, feature.weighted):
                raise UserError(
                    f"{path}: feature {feature.name!r} holds {_bag(found)} here and {_bag(feature)} in the model's "
                    "data set; prepare both alike"
                )

        if schema.vocabulary_id != self.vocabulary_id:
            raise UserError(
                f"{path}: its ids mean other values than those of the model's data set; prepare both with the same "
                "vocabulary"
            )

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def load(cls, path: Path) -> "ModelSpec":
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is missing or broken.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None

    @classmethod
    def from_dict(cls, plain: dict[str, Any], source: str) -> "ModelSpec":
        """Take back what ``to_dict`` gave; ``source`` is the file named in errors."""
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
            return cls(model, tuple(plain["dense"]), features, int(plain["seed"]), str(plain["vocabulary_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a model description: {error!r}") from None


def _bag(feature: SparseFeature) -> str:
    if not feature.multi_valued:
        return "one id a row"
    return "lists of ids with weights" if feature.weighted else "lists of ids without weights"
