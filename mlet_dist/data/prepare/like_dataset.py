"""The data set that another one is prepared like (``mlet prepare --like``): its rules, statistics and vocabularies."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mlet_dist.data.location import DataPath, data_set_path
from mlet_dist.data.prepare.counting import Scale
from mlet_dist.data.prepare.known_values import KnownValues
from mlet_dist.data.prepare.raw_formats import DenseColumn, SparseColumn, TableSpec
from mlet_dist.data.prepare.recorded_description import from_record
from mlet_dist.data.prepare.vocabulary_file import SUFFIX
from mlet_dist.data.preprocessing import (
    Preprocessing,
    Rules,
    dense_rules,
    find_difference,
    grown_from,
    label_rules,
    sparse_rules,
)
from mlet_dist.data.schema import FILE_NAME, MANIFEST, VOCABULARY, DatasetSchema, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, with_checksum
from mlet_dist.regular_file import read_regular_file

Column = TypeVar("Column", DenseColumn, SparseColumn)
Named = TypeVar("Named", DenseColumn, SparseColumn, SparseFeature)


@dataclass(frozen=True)
class LikeDataset:
    """A finished data set, whose vocabularies, sizes, means and deviations another one takes over.

    Attributes:
        path: path or URL, as given.
        schema: its schema.
        description: of the raw table that it was made from.
        grows: whether the other data set appends new values to the vocabularies.
        carried: where an export carries the vocabularies of a model; None for those in a data set.
    """

    path: str
    schema: DatasetSchema
    description: TableSpec
    grows: bool
    carried: Path | None = None

    @classmethod
    def open(cls, path: str, *, grows: bool = False) -> "LikeDataset":
        """Read the schema and the manifest of a data set.

        Raises:
            UserError: there is no data set, it was not made by `mlet prepare`, or a file is damaged.
        """
        where = data_set_path(path)
        schema, description = DatasetSchema.load(where), _description(where)
        made = [each.name for each in description.dense], [each.name for each in description.sparse]
        if made != ([*schema.dense], [each.name for each in schema.sparse]):
            raise UserError(f"{path}: {MANIFEST} describes other features than {FILE_NAME}; prepare the data set again")
        return cls(path, schema, description, grows)

    @property
    def identity(self) -> tuple[object, ...]:
        """What the rows of a data set that is prepared like this one depend on, beside its description."""
        return self.schema.vocabulary_id, sorted((name, each) for name, each in self.scales.items()), self.grows

    @property
    def scales(self) -> dict[str, Scale]:
        """Mean and deviation of each dense feature that is standardised."""
        rules = self.schema.preprocessing.dense
        names = [dense.name for dense in self.description.dense if dense.transform == "standardise"]
        return {name: Scale(rules[name]["mean"], rules[name]["deviation"]) for name in names}

    def known_values(self, table: str) -> KnownValues:
        """Return the values of a table with a vocabulary."""
        if self.carried is not None:
            file: DataPath = self.carried / f"{table}{SUFFIX}"
        else:
            file = data_set_path(self.path) / VOCABULARY / f"{table}.parquet"
        return KnownValues(str(file), table, self._rules(table)["vocabulary"], self.grows)

    def select(self, dense: Sequence[str], sparse: Sequence[str]) -> "LikeDataset":
        """Return what makes these columns and features alone, in this order; the data set must have them."""
        own, made = self.description, self.schema
        schema = replace(
            made,
            dense=tuple(dense),
            sparse=_named(made.sparse, sparse),
            preprocessing=made.preprocessing.select(dense, sparse),
            parts={},
            id_counts={},
        )
        description = replace(own, dense=_named(own.dense, dense), sparse=_named(own.sparse, sparse))
        return replace(self, schema=schema, description=description)

    def extended_by(self, table: str, fingerprint: str) -> list[str]:
        """Return what a vocabulary of ``table`` with this fingerprint has grown from, as ``sparse_rules`` takes it."""
        rules = self._rules(table)
        return list(rules.get("extends", ())) if fingerprint == rules["vocabulary"] else grown_from(rules)

    def extended_sets(self, vocabulary_id: str) -> tuple[str, ...]:
        """Return the ``DatasetSchema.extends`` of a data set with this ``vocabulary_id``."""
        own = self.schema.vocabulary_id
        return self.schema.extends if vocabulary_id == own else (*self.schema.extends, own)

    def pooling_factor(self, feature: str) -> float:
        """Return the mean number of ids per row of a feature."""
        return self._feature(feature).pooling_factor

    def check(self, spec: TableSpec) -> tuple[TableSpec, str | None]:
        """Check that a description makes the features of this data set, in the same way.

        It may read other columns and another kind of file. Where vocabularies grow, it decides which values they take.

        Returns:
            The description with the features in the order of this data set, and a warning if the label is made in
            another way.

        Raises:
            UserError: a feature is missing, is not in this data set, or is made in another way.
        """
        own = self.description
        self.check_format(spec.source)
        dense = self._in_order("dense column", spec.dense, [each.name for each in own.dense])
        sparse = self._in_order("sparse feature", spec.sparse, [each.name for each in own.sparse])
        for feature in sparse:
            known = self._feature(feature.name)
            for key, found, wanted in (
                ("multi_valued", feature.multi_valued, known.multi_valued),
                ("weights", feature.weighted, known.weighted),
            ):
                if found != wanted:
                    raise UserError(
                        f"{self.path}: sparse feature {feature.name} has {key} {_yes(wanted)} there and {_yes(found)} "
                        "in the description; both must be the same"
                    )
        made, here, there = _rules_of(replace(spec, dense=dense, sparse=sparse)), "in the description", "there"
        difference = find_difference(made, replace(_rules_of(own), label=made.label, more_labels={}), here, there)
        if difference is not None:
            raise UserError(
                f"{self.path}: {difference.text}; make it in the same way, or leave out --schema, for the description "
                "of that data set"
            )
        names = [[each.column_name for each in of.labels] for of in (own, spec)]
        if names[0] != names[1]:
            raise UserError(
                f"{self.path}: has the labels {', '.join(names[0])}, and the description {', '.join(names[1])}; both "
                "must have the same, in the same order"
            )
        label = find_difference(made, _rules_of(own).select((), ()), here, there)
        return (
            replace(spec, dense=dense, sparse=sparse),
            None if label is None else f"{self.path}: {label.text}; a model of that data set was trained on its labels",
        )

    def check_format(self, source: str) -> None:
        """Raise UserError unless this is the raw format that the data set was made from."""
        own = self.description.source
        if source != own:
            raise UserError(
                f"{self.path}: was made by `mlet prepare {own}`, not {source}; give the format {own}, and files of it"
            )

    def _rules(self, table: str) -> Rules:
        feature = next(each for each in self.schema.sparse if each.table_name == table)
        return self.schema.preprocessing.sparse[feature.name]

    def _feature(self, name: str) -> SparseFeature:
        return next(each for each in self.schema.sparse if each.name == name)

    def _in_order(self, kind: str, columns: Iterable[Column], names: list[str]) -> tuple[Column, ...]:
        found = {column.name: column for column in columns}
        for name in names:
            if name not in found:
                raise UserError(
                    f"{self.path}: has the {kind} {name!r}, which the description lacks; a column of another name can "
                    f"be described with `column` and `name: {name}`"
                )
        for name in found:
            if name not in names:
                raise UserError(
                    f"{self.path}: lacks the {kind} {name!r}, which the description has; leave it out, or prepare a "
                    "data set of its own without --like"
                )
        return tuple(found[name] for name in names)


def _named(columns: Iterable[Named], names: Iterable[str]) -> tuple[Named, ...]:
    found = {each.name: each for each in columns}
    return tuple(found[name] for name in names)


def _rules_of(spec: TableSpec) -> Preprocessing:
    """Return how columns are made, without what comes from the training split."""
    return Preprocessing(
        label_rules(spec.label),
        {each.name: dense_rules(each) for each in spec.dense},
        {each.name: sparse_rules(each, None) for each in spec.sparse},
        {each.column_name: label_rules(each) for each in spec.more_labels},
    )


def _description(path: DataPath) -> TableSpec:
    """Return the description that the manifest of a data set records."""
    file = path / MANIFEST
    remedy = "name a data set that this version of `mlet prepare` made"
    try:
        text = read_regular_file(file).decode() if isinstance(file, Path) else file.read_text(encoding="utf-8")
        content = json.loads(text)
        if content[CHECKSUM] != with_checksum(content)[CHECKSUM]:
            raise ValueError("the SHA-256 of its content is another one")
        return from_record(content["arguments"])
    except FileNotFoundError:
        raise UserError(f"{path}: has no {MANIFEST}, which records how it was made; {remedy}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: does not tell how the data set was made: {error!r}; {remedy}") from None


def _yes(flag: bool) -> str:
    return "true" if flag else "false"
