"""What is known of the inputs that given weights were trained on, compared with those of the model that takes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlet_dist.data.preprocessing import LIKE_REMEDY, Preprocessing, extends, find_difference
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec, describe_bag

# Keys of a run's identity (``resume.identity_of``), beside those that are names of settings.
DENSE_FEATURES, SPARSE_FEATURES = "data.dense_features", "data.sparse_features"
VOCABULARY_ID = "the data set's vocabulary_id"


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

    def grown_tables(self, spec: ModelSpec) -> dict[str, int]:
        """Return how many rows the tables had whose vocabularies have grown to those of the model, by name.

        Their ids mean the same, and those of the rows that they had not are new.
        """
        now, before = spec.preprocessing, self.preprocessing
        if now is None or before is None:
            return {}
        return {
            feature.table_name: self.features[feature.name].num_embeddings
            for feature in spec.sparse
            if feature.name in before.sparse and extends(now.sparse[feature.name], before.sparse[feature.name])
        }

    def check(self, spec: ModelSpec, data: str, *, dense_layers: bool) -> list[str]:
        """Return warnings on what may be different on purpose, or cannot be compared.

        Args:
            spec: the model to start.
            data: its data set, for messages.
            dense_layers: whether dense layers are taken; they need the inputs that they had, made as before.

        Raises:
            UserError: dense layers would get other inputs or the same in another order, ids belong to another
                vocabulary, which is none that has grown from that of the weights, or a column was made differently.
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
        inputs = replace(before.select(spec.dense if dense_layers else (), names), label=now.label, more_labels={})
        self._check_not_shrunk(spec, data)
        difference = find_difference(now, inputs, here, there, "extends")
        if difference is not None:
            raise UserError(f"{self.location}: {difference.text}; {difference.remedy}")
        label = find_difference(now, before.select((), ()), here, there) if dense_layers else None
        if label is not None:
            warnings.append(f"{label.text}; training goes on with the labels of {data}")
        return warnings

    def _check_not_shrunk(self, spec: ModelSpec, data: str) -> None:
        """Raise UserError if the vocabulary of a feature is one from which that of the weights has grown."""
        if spec.preprocessing is None or self.preprocessing is None:
            return
        for feature in spec.sparse:
            old = self.features.get(feature.name)
            if old is not None and extends(
                self.preprocessing.sparse[feature.name], spec.preprocessing.sparse[feature.name]
            ):
                raise UserError(
                    f"{self.location}: table {feature.table_name!r} has {old.num_embeddings:,} rows there, and only "
                    f"{feature.num_embeddings:,} in the model: its vocabulary has grown from that of {data}; prepare "
                    "that data with --like and the data set of the weights"
                )

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
                f"{self.location}: its rows belong to another vocabulary than that of {data}; {LIKE_REMEDY}"
            )
        if not dense_layers or not spec.dense:
            return []
        return [
            "does not record how its dense columns were made, so that they cannot be compared with those of "
            f"{data}; they must have been made in the same way"
        ]


def describe_growth(grown: Mapping[str, int], spec: ModelSpec) -> str:
    """Return how many rows of a model are new, for the log; nothing if none is."""
    new = [table.num_embeddings - grown.get(table.name, table.num_embeddings) for table in spec.tables]
    tables = sum(map(bool, new))
    return f"; {sum(new):,} rows of {tables} table{'s' * (tables > 1)} are new, and are drawn" if tables else ""
