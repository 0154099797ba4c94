"""What decides the meaning of an input is recorded, compared, and named where it differs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.preprocessing import (
    LIKE_REMEDY,
    Preprocessing,
    Relation,
    dense_rules,
    find_difference,
    grown_from,
    label_rules,
    sparse_rules,
)
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.data.synthetic import synthesize

PRICE = DenseColumn("price", "price_eur", "standardise", missing="mean")
USER = SparseColumn("user", "user_id", min_count=3)
CLICK = LabelColumn("click", positive_from=0.5)
WEIGHT = {"transform": "log1p", "missing": 0.0}


def made(dense: Any = PRICE, sparse: Any = USER, label: Any = CLICK, vocabulary: str | None = "abc") -> Preprocessing:
    statistics = {"mean": 3.125, "deviation": 2.25} if dense.transform == "standardise" else {}
    return Preprocessing(
        label_rules(label),
        {"weight": WEIGHT, "price": dense_rules(dense, **statistics)},
        {"user": sparse_rules(sparse, vocabulary)},
    )


def difference(found: Preprocessing, wanted: Preprocessing | None = None) -> tuple[str, str] | None:
    return find_difference(found, made() if wanted is None else wanted, "here", "there")


def test_rules_are_all_that_decides_the_meaning_of_a_value() -> None:
    assert made().dense["price"] == {"transform": "standardise", "missing": "mean", "mean": 3.125, "deviation": 2.25}
    assert made().sparse["user"] == {"encoding": "vocabulary", "vocabulary": "abc"}
    assert made().label == {"column": "click", "positive_from": 0.5}
    hashed = sparse_rules(dataclasses.replace(USER, encoding="hash", num_embeddings=9), None)
    assert hashed == {"encoding": "hash", "num_embeddings": 9}
    assert difference(made()) is None


def test_all_fields_are_compared_but_those_that_do_not_change_the_meaning() -> None:
    for kind, made_by, omitted in (
        (DenseColumn, dense_rules, "name column integer"),
        (LabelColumn, label_rules, "name"),
        (
            SparseColumn,
            lambda column: sparse_rules(column, None),
            "name column separator weights weight_separator multi_valued min_count max_num_embeddings",
        ),
    ):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - set(made_by(kind(**dict.fromkeys(names, "set")))) == set(omitted.split())


@dataclasses.dataclass(frozen=True)
class LaterDense(DenseColumn):
    clip: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class LaterSparse(SparseColumn):
    bucket: int | None = None


@dataclasses.dataclass(frozen=True)
class LaterLabel(LabelColumn):
    values: tuple[str, ...] | None = None


def test_fields_that_a_later_version_adds_are_compared_once_they_are_set() -> None:
    assert difference(made(LaterDense(**dataclasses.asdict(PRICE)), LaterSparse(**dataclasses.asdict(USER)))) is None
    assert difference(made(label=LaterLabel("click", 0.5))) is None
    later = made(LaterDense(**dataclasses.asdict(PRICE), clip=(0.0, 9.5)))
    text, remedy = difference(later) or ("", "")
    assert text == "dense column price has clip [0.0, 9.5] here and no clip there"
    assert remedy == "prepare both data sets in the same way"
    text, _ = difference(made(sparse=LaterSparse(**dataclasses.asdict(USER), bucket=5))) or ("", "")
    assert text == "sparse feature user has bucket 5 here and no bucket there"
    text, _ = difference(made(label=LaterLabel("click", 0.5, values=("yes", "1")))) or ("", "")
    assert text == 'the label has values ["yes", "1"] here and no values there'


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"dense": dataclasses.replace(PRICE, transform="raw", missing=0.0)},
            "dense column price has transform raw, missing 0 here and transform standardise, "
            "missing mean, mean 3.125, deviation 2.25 there",
        ),
        (
            {"dense": dataclasses.replace(PRICE, missing=-1.5)},
            "dense column price has missing -1.5 here and missing mean",
        ),
        ({"label": LabelColumn("click", 4.0)}, "the label has positive_from 4 here and positive_from 0.5 there"),
        ({"label": LabelColumn("like", 0.5)}, "the label has column like here and column click there"),
        (
            {"sparse": dataclasses.replace(USER, cast="integer")},
            "sparse feature user has cast integer here and no cast",
        ),
        (
            {"sparse": dataclasses.replace(USER, missing_values=())},
            "sparse feature user has missing_values [] here and",
        ),
        ({"sparse": dataclasses.replace(USER, max_len=4)}, "sparse feature user has max_len 4, keep first here and no"),
        (
            {"sparse": dataclasses.replace(USER, encoding="hash", num_embeddings=7), "vocabulary": None},
            "sparse feature user has encoding hash, num_embeddings 7 here and encoding vocabulary th",
        ),
        ({"vocabulary": "abd"}, "the ids of sparse feature user belong to another vocabulary here than there"),
    ],
)
def test_every_other_rule_is_named(changes: dict[str, Any], expected: str) -> None:
    found = difference(made(**changes))
    assert found is not None
    assert found[0].startswith(expected)
    assert found[1] == (LIKE_REMEDY if set(changes) == {"vocabulary"} else "prepare both data sets in the same way")


@pytest.mark.parametrize(
    "changes",
    [
        {"dense": dataclasses.replace(PRICE, column="price", integer=True)},
        {"sparse": dataclasses.replace(USER, column="user", min_count=1, max_num_embeddings=9, cast="text")},
        {"sparse": dataclasses.replace(USER, separator="|", multi_valued=True, weight_separator=":", keep="last")},
    ],
)
def test_how_a_raw_file_is_read_does_not_matter(changes: dict[str, Any]) -> None:
    assert difference(made(**changes)) is None


def with_statistics(mean: float, deviation: float) -> Preprocessing:
    return dataclasses.replace(made(), dense={"price": dense_rules(PRICE, mean=mean, deviation=deviation)})


def test_another_mean_or_deviation_is_named_with_the_digits_that_differ() -> None:
    wanted = with_statistics(3.125, 2.25)
    text, remedy = difference(with_statistics(3.5, 2.25), wanted) or ("", "")
    assert text == "dense column price has mean 3.5 here and mean 3.125 there"
    assert remedy == LIKE_REMEDY
    assert remedy.startswith("use the data set that the model was trained on, or prepare this one with --like")
    text, _ = difference(with_statistics(3.125, 2.25000001), wanted) or ("", "")
    assert text == "dense column price has deviation 2.2500000099999999 here and deviation 2.25 there"


def test_statistics_may_differ_by_rounding_alone() -> None:
    """The same rows in other files sum up in another order."""
    assert difference(with_statistics(3.125 * (1 + 1e-14), 2.25 * (1 - 1e-14)), with_statistics(3.125, 2.25)) is None
    assert difference(with_statistics(1e-15, 1.0), with_statistics(-2e-15, 1.0)) is None
    assert difference(with_statistics(1e-3, 1e6), with_statistics(0.0, 1e6)) is None
    assert difference(with_statistics(1e-3, 1e-2), with_statistics(0.0, 1e-2)) is not None


def test_only_the_columns_of_the_model_are_compared_and_others_that_differ_are_counted() -> None:
    other = made(dataclasses.replace(PRICE, missing=1.0), vocabulary="xyz", label=LabelColumn("like"))
    text, _ = difference(other) or ("", "")
    assert text.startswith("the label has column like here and column click, positive_from 0.5 there")
    assert text.endswith("(and 2 more made differently)")
    same_label = dataclasses.replace(other, label=made().label)
    assert difference(same_label, made().select(["weight"], [])) is None
    text, _ = difference(same_label, made().select([], ["user"])) or ("", "")
    assert text == "the ids of sparse feature user belong to another vocabulary here than there"


def test_it_is_plain_data_that_is_read_back() -> None:
    plain = json.loads(json.dumps(made().to_dict()))
    assert Preprocessing.from_dict(plain) == made()
    for broken in ({}, {"label": {}, "dense": 3, "sparse": {}}, {"label": {}, "dense": {"a": "b"}, "sparse": {}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Preprocessing.from_dict(broken)


def prepared(directory: Path, raw: list[Path], **description: Any) -> DatasetSchema:
    """Prepare raw files; return the schema as it is read from the disk."""
    columns = {
        "label": {"column": "y"},
        "dense": [{"column": "a", "transform": "standardise"}, {"column": "b"}],
        "sparse": [{"column": "x"}],
    }
    directory.mkdir()
    (directory / "table.yaml").write_text(json.dumps(columns | description))
    prepare(load_table(directory / "table.yaml"), raw, directory / "data")
    return DatasetSchema.load(directory / "data")


def test_the_same_rows_in_other_files_have_the_same_identity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "y": rng.integers(0, 2, 500),
            "a": rng.lognormal(size=500).round(3),
            "b": rng.integers(0, 9, 500),
            "x": [[f"v{value}" for value in rng.integers(0, 5, 3)] for _ in range(500)],
        }
    )
    rows = [f"{row['y']},{row['a']},{row['b']},{'|'.join(row['x'])}" for row in table.to_pylist()]
    one, *three = (tmp_path / f"{index}.csv" for index in range(4))
    for path, part in ((one, rows), *zip(three, (rows[:10], rows[10:333], rows[333:]), strict=True)):
        path.write_text("\n".join(["y,a,b,x", *part]))
    pq.write_table(table, tmp_path / "table.parquet")
    lists = {"format": "csv", "sparse": [{"column": "x", "separator": "|"}]}
    whole = prepared(tmp_path / "whole", [one], **lists)
    in_parts = prepared(tmp_path / "parts", three, **lists)
    arrow = {"format": "parquet", "sparse": [{"column": "x", "multi_valued": True}]}
    parquet = prepared(tmp_path / "parquet", [tmp_path / "table.parquet"], **arrow)
    for other in (in_parts, parquet):
        assert find_difference(other.preprocessing, whole.preprocessing, "here", "there") is None
        assert find_difference(whole.preprocessing, other.preprocessing, "here", "there") is None
    assert whole.preprocessing.dense["a"]["mean"] == pytest.approx(table["a"].to_numpy()[:400].mean(), rel=1e-12)
    assert whole.preprocessing.dense["b"] == {"transform": "log1p", "missing": 0.0}


def test_synthetic_data_sets_have_an_identity_that_depends_on_their_model(tmp_path: Path) -> None:
    def of(name: str, **arguments: Any) -> Preprocessing:
        synthesize(tmp_path / name, **{"rows": 100, "num_embeddings": 50} | arguments)
        return DatasetSchema.load(tmp_path / name).preprocessing

    first = of("first")
    assert first.dense["I3"] == {"transform": "log1p", "missing": 0.0}
    assert find_difference(of("more rows", rows=300), first, "here", "there") is None
    for name, changes in (("seed", {"seed": 9}), ("alpha", {"alpha": 2.0}), ("sizes", {"num_embeddings": 60})):
        text, _ = difference(of(name, **changes), first) or ("", "")
        assert text.startswith("the ids of sparse feature C1 belong to another vocabulary here than there")
        assert text.endswith("(and 25 more made differently)")


def test_a_vocabulary_that_has_grown_fits_where_it_may() -> None:
    """One grows into the next twice; the other is its brother, whose ids behind the first ones mean something else."""
    first, second, third, brother = (made(vocabulary=letter * 64) for letter in "abcd")
    grown: dict[str, Preprocessing] = {"first": first}
    for name, one, before in (("second", second, first), ("third", third, None), ("brother", brother, first)):
        rules = (before or grown["second"]).sparse["user"]
        own = sparse_rules(USER, one.sparse["user"]["vocabulary"], grown_from(rules))
        grown[name] = dataclasses.replace(one, sparse={"user": own})
    assert grown["third"].sparse["user"]["extends"] == ["a" * 16, "b" * 16]

    def fits(found: str, wanted: str, vocabularies: Relation) -> bool:
        return find_difference(grown[found], grown[wanted], "here", "there", vocabularies) is None

    names = list(grown)
    pairs = [(found, wanted) for found in names for wanted in names]
    later = [("second", "first"), ("third", "first"), ("third", "second"), ("brother", "first")]
    same = [(name, name) for name in names]
    assert [pair for pair in pairs if fits(*pair, "same")] == same
    assert {pair for pair in pairs if fits(*pair, "extends")} == {*same, *later}
    assert {pair for pair in pairs if fits(*pair, "either")} == {*same, *later, *(pair[::-1] for pair in later)}
    # Another history of the same values is no difference, and other rules are one whatever has grown.
    found = dataclasses.replace(third, sparse={"user": sparse_rules(USER, "c" * 64)})
    assert find_difference(found, grown["third"], "here", "there") is None
    other = grown["second"].sparse["user"] | {"cast": "integer"}
    different = find_difference(dataclasses.replace(second, sparse={"user": other}), first, "here", "there", "either")
    assert different is not None
    assert different.text == "sparse feature user has cast integer here and no cast there"
