"""A warm start takes only weights whose inputs are those of the model, and names the difference otherwise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.preprocessing import Preprocessing, grown_from
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.export.factorize.run_factorize import factorize_tables
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.source_inputs import SourceInputs, describe_growth
from tests.helpers.mlet_command import error_line, mlet, mlet_json

SPEC = ModelSpec(
    ModelConfig(hidden_dim=8),
    ("price", "age"),
    (
        SparseFeature("user", 7),
        SparseFeature("item", 5),
        SparseFeature("tags", 4, multi_valued=True, pooling_factor=2.0),
    ),
    seed=0,
    vocabulary_id="v",
    preprocessing=Preprocessing(
        {"column": "click"},
        {"price": {"transform": "standardise", "mean": 3.0, "deviation": 2.0}, "age": {"transform": "raw"}},
        {name: {"encoding": "vocabulary", "vocabulary": f"{name}s"} for name in ("user", "item", "tags")},
    ),
)
MADE = SPEC.preprocessing
assert MADE is not None


def source(spec: ModelSpec = SPEC, **about: Any) -> SourceInputs:
    return SourceInputs.of({"spec": spec.to_dict()} | about, "old/step-9")


def refusal(spec: ModelSpec, *, dense_layers: bool = True, found: SourceInputs | None = None) -> str:
    found = found or source()
    with pytest.raises(UserError) as caught:
        found.check(spec, "data/new", dense_layers=dense_layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def select(spec: ModelSpec, dense: tuple[str, ...], sparse: tuple[str, ...]) -> ModelSpec:
    assert spec.preprocessing is not None
    features = {feature.name: feature for feature in spec.sparse}
    made = spec.preprocessing.select(dense, sparse)
    return dataclasses.replace(spec, dense=dense, sparse=tuple(features[name] for name in sparse), preprocessing=made)


def with_rules(kind: str, name: str, **rules: Any) -> ModelSpec:
    made = SPEC.preprocessing
    assert made is not None
    columns = getattr(made, kind)
    changed = dataclasses.replace(made, **{kind: columns | {name: columns[name] | rules}})
    return dataclasses.replace(SPEC, preprocessing=changed)


def test_the_same_inputs_are_accepted_without_a_word() -> None:
    assert source().check(SPEC, "data/new", dense_layers=True) == []


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        (
            ("age", "price"),
            ("user", "item", "tags"),
            'data.dense_features was ["price", "age"], is ["age", "price"]; set data.dense_features=[price,age]',
        ),
        (
            ("price", "age"),
            ("tags", "user", "item"),
            'data.sparse_features was ["user", "item", "tags"], is ["tags", "user", "item"]; '
            "set data.sparse_features=[user,item,tags]",
        ),
        (
            ("age",),
            ("user", "item", "tags"),
            'data.dense_features was ["price", "age"], is ["age"]; set data.dense_fea',
        ),
        (
            ("price", "age"),
            ("user", "tags"),
            'was ["user", "item", "tags"], is ["user", "tags"]; set data.sparse_featu',
        ),
    ],
)
def test_dense_layers_are_not_taken_for_other_columns_or_another_order(
    dense: tuple[str, ...], sparse: tuple[str, ...], expected: str
) -> None:
    message = refusal(select(SPEC, dense, sparse))
    assert message.startswith("old/step-9: its dense layers take their inputs by position, and data.")
    assert expected in message


@pytest.mark.parametrize("sparse", [("tags", "user", "item"), ("item",), ("tags", "user")])
def test_tables_alone_are_taken_by_name(sparse: tuple[str, ...]) -> None:
    """Neither the order nor all of the features matter then, nor the dense columns."""
    chosen = select(with_rules("dense", "price", mean=9.0), ("age",), sparse)
    assert source().check(chosen, "data/new", dense_layers=False) == []


def test_a_table_whose_ids_mean_other_values_is_named() -> None:
    other = with_rules("sparse", "item", vocabulary="others")
    expected = (
        "old/step-9: the ids of sparse feature item belong to another vocabulary in data/new than where the weights"
    )
    assert refusal(other).startswith(expected)
    assert refusal(other, dense_layers=False).startswith(expected)
    chosen = select(other, ("price", "age"), ("user", "tags"))
    assert source().check(chosen, "data/new", dense_layers=False) == []


@pytest.mark.parametrize(
    ("name", "rules", "expected"),
    [
        (
            "price",
            {"mean": 3.5},
            "dense column price has mean 3.5 in data/new and mean 3 where the weights were trained",
        ),
        ("age", {"transform": "log1p"}, "dense column age has transform log1p in data/new and transform raw where the"),
    ],
)
def test_dense_columns_that_were_made_differently_are_named(name: str, rules: dict[str, Any], expected: str) -> None:
    assert expected in refusal(with_rules("dense", name, **rules))


def test_lists_instead_of_single_ids_are_refused_with_dense_layers() -> None:
    features = (SPEC.sparse[0], dataclasses.replace(SPEC.sparse[1], multi_valued=True), SPEC.sparse[2])
    message = refusal(dataclasses.replace(SPEC, sparse=features))
    assert "feature 'item' holds one id a row; in the data set it holds lists of ids without weights; prep" in message
    denser = (*SPEC.sparse[:2], dataclasses.replace(SPEC.sparse[2], pooling_factor=9.0))
    assert source().check(dataclasses.replace(SPEC, sparse=denser), "data/new", dense_layers=True) == []


def test_another_label_is_a_warning_since_it_may_be_the_purpose() -> None:
    assert MADE is not None
    other = dataclasses.replace(SPEC, preprocessing=dataclasses.replace(MADE, label={"column": "buy"}))
    (warning,) = source().check(other, "data/new", dense_layers=True)
    assert warning == (
        "the label has column buy in data/new and column click where the weights were trained; training goes on "
        "with the labels of data/new"
    )


def test_a_checkpoint_that_records_no_preprocessing_is_compared_by_what_it_has() -> None:
    identity = {
        "data.dense_features": ["price", "age"],
        "data.sparse_features": ["user", "item", "tags"],
        "the data set's vocabulary_id": "v",
    }
    old = SourceInputs.of({"identity": identity}, "old/step-9")
    (warning,) = old.check(SPEC, "data/new", dense_layers=True)
    assert "does not record how its dense columns were made" in warning
    assert old.check(SPEC, "data/new", dense_layers=False) == []
    swapped = select(SPEC, ("age", "price"), ("user", "item", "tags"))
    assert 'data.dense_features was ["price", "age"]' in refusal(swapped, found=old)
    other = dataclasses.replace(SPEC, vocabulary_id="w")
    assert "its rows belong to another vocabulary than that of data/new" in refusal(other, found=old)
    without = SPEC.to_dict()
    del without["preprocessing"]
    factors = SourceInputs.of({"factorized": {}, "spec": without}, "old/step-9")
    (warning,) = factors.check(SPEC, "data/new", dense_layers=True)
    assert "does not record how its dense columns were made" in warning


def test_tables_of_another_program_give_warnings() -> None:
    unknown = SourceInputs.of({"factorized": {}, "spec": None, "vocabulary_id": None}, "factors/step-0")
    by_position, ids = unknown.check(SPEC, "data/new", dense_layers=True)
    assert by_position.startswith("names no columns, and its dense layers take them by position")
    assert by_position.endswith("price, age; user, item, tags")
    assert ids == "names no vocabulary; its rows must belong to the ids of data/new"
    assert unknown.check(SPEC, "data/new", dense_layers=False) == [ids]


def grown(spec: ModelSpec, name: str, rows: int, vocabulary: str) -> ModelSpec:
    """Return the spec with a feature whose vocabulary has grown to ``rows`` rows."""
    made = spec.preprocessing
    assert made is not None
    rules = made.sparse[name] | {"vocabulary": vocabulary, "extends": grown_from(made.sparse[name])}
    sparse = tuple(
        dataclasses.replace(each, num_embeddings=rows) if each.name == name else each for each in spec.sparse
    )
    return dataclasses.replace(
        spec, sparse=sparse, preprocessing=dataclasses.replace(made, sparse=made.sparse | {name: rules})
    )


def test_a_vocabulary_that_has_grown_is_taken_and_one_that_shrinks_is_refused_by_name() -> None:
    second = grown(SPEC, "item", 9, "later items")
    third = grown(grown(second, "item", 12, "last items"), "user", 8, "later users")
    for later, expected in ((second, {"item": 5}), (third, {"user": 7, "item": 5}), (SPEC, {})):
        assert source().check(later, "data/new", dense_layers=True) == []
        assert source().grown_tables(later) == expected
    assert source(second).grown_tables(third) == {"user": 7, "item": 9}
    assert describe_growth({"user": 7, "item": 5}, third) == "; 8 rows of 2 tables are new, and are drawn"
    assert describe_growth({"item": 5}, second) == "; 4 rows of 1 table are new, and are drawn"
    assert describe_growth({}, SPEC) == ""
    assert refusal(SPEC, found=source(second)) == (
        "old/step-9: table 'item' has 9 rows there, and only 5 in the model: its vocabulary has grown from that of "
        "data/new; prepare that data with --like and the data set of the weights"
    )
    brother = grown(SPEC, "item", 9, "other items")
    assert "the ids of sparse feature item belong to another vocabulary" in refusal(brother, found=source(second))
    assert source(second).grown_tables(brother) == {}


CONFIG = """
data: {batch_size: 50}
model: {embedding_dim: 4, hidden_dim: 8, bottom_mlp: [8], top_mlp: [8]}
optimizer: {name: adagrad, learning_rate: 0.05}
train: {max_steps: 4}
"""
SCHEMA = """
format: csv
label: {{column: click}}
dense: [{}]
sparse: [{}]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with data sets of the same log, a run of single layers on the first, and its factors."""
    path = tmp_path_factory.mktemp("warm")
    (path / "config.yaml").write_text(CONFIG)
    lines = [f"{(i * i) % 3 % 2},{i % 17},{i % 5 + 0.5},u{i % 11},i{i * 7 % 13}" for i in range(400)]
    (path / "log.csv").write_text("\n".join(["click,price,age,user,item", *lines]))
    price = "{column: price, transform: standardise}"
    age, user, item = (f"{{column: {column}}}" for column in ("age", "user", "item"))
    for name, dense, sparse in (
        ("data", f"{price}, {age}", f"{user}, {item}"),
        ("other_dense", f"{age}, {price}", f"{user}, {item}"),
        ("other_sparse", f"{price}, {age}", f"{item}, {user}"),
    ):
        (path / f"{name}.yaml").write_text(SCHEMA.format(dense, sparse))
        prepare(load_table(path / f"{name}.yaml"), [path / "log.csv"], path / name)
    run = (f"data.path={path / 'data'}", f"run.dir={path / 'run'}", "model.hidden_dim=null")
    mlet("train", path / "config.yaml", *run, "--export", path / "export")
    factorize_tables(path / "export", 8, path / "factors")
    factorize_tables(path / "export", 8, path / "tables", tables_only=True)
    return path


def start(base: Path, weights: str, data: str, run: Path, *more: str) -> tuple[object, ...]:
    still = ("train.max_steps=1", "optimizer.learning_rate=1e-9", f"train.initial_weights={base / weights}")
    return ("train", base / "config.yaml", f"data.path={base / data}", f"run.dir={run}", *still, *more)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("weights", "kind", "before", "now", "more"),
    [
        ("factors", "dense", "price,age", "age,price", ()),
        ("run", "sparse", "user,item", "item,user", ("model.hidden_dim=null",)),
    ],
)
def test_a_description_in_another_order_is_refused_and_the_order_of_before_gives_the_same_model(
    base: Path, tmp_path: Path, weights: str, kind: str, before: str, now: str, more: tuple[str, ...]
) -> None:
    data, key = f"other_{kind}", f"data.{kind}_features"
    message = error_line(*start(base, weights, data, tmp_path / "refused", *more))
    was, found = (str([*names.split(",")]).replace("'", '"') for names in (before, now))
    assert f"{key} was {was}, is {found}; set {key}=[{before}]" in message
    assert not (tmp_path / "refused" / "config.yaml").exists()
    again = mlet_json(*start(base, weights, data, tmp_path / "again", f"{key}=[{before}]", *more))
    expected = json.loads((base / "run" / "summary.json").read_text())["test_logloss"]
    assert again["test_logloss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.e2e
def test_tables_are_taken_in_any_order_and_choice(base: Path, tmp_path: Path) -> None:
    more = ("data.sparse_features=[item]", "data.dense_features=[age]")
    result = mlet(*start(base, "tables", "other_sparse", tmp_path / "run", *more))
    assert "starting with the tables of" in result.stderr
    assert not [line for line in result.stderr.splitlines() if line.startswith(("warning", "mlet: warning"))]
