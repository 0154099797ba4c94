import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import DataConfig, RunConfig, TrainConfig
from mlet_dist.config.table_settings import TableModelConfig
from mlet_dist.data.preprocessing import LIKE_REMEDY, Preprocessing, grown_from
from mlet_dist.data.schema import DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec


def made_of(dense: Iterable[str], sparse: Iterable[str]) -> Preprocessing:
    return Preprocessing(
        {"column": "click"},
        {name: {"transform": "standardise", "missing": 0.0, "mean": 3.125, "deviation": 2.25} for name in dense},
        {name: {"encoding": "vocabulary", "vocabulary": f"values of {name}"} for name in sparse},
    )


SPEC = ModelSpec(
    ModelConfig(hidden_dim=8, projection_init_std=0.25, bottom_mlp=()),
    ("I2", "I1"),
    (SparseFeature("C2", 1_234), SparseFeature("C1", 9)),
    seed=3,
    preprocessing=made_of(("I2", "I1"), ("C2", "C1")),
)
HERE = Path("some/data")


def schema(dense: tuple[str, ...] = ("I1", "I2", "I3"), **sizes: int) -> DatasetSchema:
    sparse = tuple(SparseFeature(name, size) for name, size in sizes.items())
    parts = {split: (Part(f"{split}/0.parquet", 10, 5, 99, *2 * (64 * "0",)),) for split in ("train", "valid", "test")}
    return DatasetSchema("synthetic", "label", dense, sparse, 0, parts, made_of(dense, [*sizes]))


def config(**data: Any) -> Config:
    return Config(DataConfig(path="logs", **data), RunConfig(dir="out"), SPEC.model, train=TrainConfig(seed=3))


def message_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_has_all_features_or_those_requested_in_their_order() -> None:
    found = ModelSpec.of(config(), schema(C1=9, C2=1_234))
    assert (found.dense, found.sparse) == (("I1", "I2", "I3"), (SparseFeature("C1", 9), SparseFeature("C2", 1_234)))
    found = ModelSpec.of(config(dense_features=("I2", "I1"), sparse_features=("C2", "C1")), schema(C1=9, C2=1_234))
    assert found == SPEC


def test_a_requested_feature_that_is_missing_is_named() -> None:
    message = message_of(ModelSpec.of, config(sparse_features=("C1", "X")), schema(C1=9, C2=5))
    assert message == "data.sparse_features: logs has no column 'X'; it has C1, C2"


names = st.lists(st.text(min_size=1), min_size=1, unique=True)


@given(
    dense=names,
    sparse=names,
    size=st.integers(1, 10**15),
    hidden_dim=st.none() | st.integers(1, 2**14).map(lambda quarter: 4 * quarter),
    std=st.none() | st.floats(min_value=1e-15, max_value=1e15),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_spec_is_restored_from_json(
    dense: list[str], sparse: list[str], size: int, hidden_dim: int | None, std: float | None, seed: int
) -> None:
    model = ModelConfig(hidden_dim=hidden_dim, projection_init_std=std)
    spec = ModelSpec(model, tuple(dense), tuple(SparseFeature(name, size) for name in sparse), seed)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())), "here") == spec


def test_it_is_read_back_from_its_file(tmp_path: Path) -> None:
    SPEC.save(tmp_path / "model.json")
    assert ModelSpec.load(tmp_path / "model.json") == SPEC
    plain = json.loads((tmp_path / "model.json").read_text())
    assert [(each["name"], each["num_embeddings"]) for each in plain["sparse"]] == [("C2", 1234), ("C1", 9)]
    assert plain["model"]["hidden_dim"] == 8


OWN = TableModelConfig(embedding_dim=32, hidden_dim=96, pooling="mean", rows_init="normal", projection_init_std=0.5)


def test_settings_of_single_tables_are_resolved_once_and_read_back() -> None:
    """Rules and patterns are applied to the tables of the data set, and not again to the numbers of rows of others."""
    tables = {"C2": OWN, "C[13]": TableModelConfig(4)}
    model = dataclasses.replace(SPEC.model, name="dlrm_dcn", projection_init_std=None, tables=tables)
    spec = ModelSpec.of(dataclasses.replace(config(), model=model), schema(C1=8, C2=1_234, C3=9, C4=9))
    found = {table.name: (table.embedding_dim, table.hidden_dim) for table in spec.tables}
    assert found == {"C1": (4, None), "C2": (32, 96), "C3": (4, 8), "C4": (16, 8)}
    assert spec.table_settings.keys() == {"C1", "C2", "C3"}
    assert spec.embedding_dims == {name: d for name, (d, _) in found.items()}
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())), "here")
    assert again == spec
    larger = tuple(dataclasses.replace(each, num_embeddings=10**6) for each in again.sparse)
    tables = dataclasses.replace(again, sparse=larger).tables
    assert [table.settings for table in tables] == [table.settings for table in spec.tables]
    assert {table.hidden_dim for table in again.with_hidden_dim(None).tables} == {None}
    assert again.with_hidden_dim(None).embedding_dims == spec.embedding_dims


def test_a_spec_of_an_earlier_version_has_two_layers_in_all_tables() -> None:
    plain = dataclasses.replace(SPEC, sparse=(SparseFeature("C1", 2), SparseFeature("C2", 3))).to_dict()
    assert "table_settings" not in plain
    del plain["model"]["single_layer_up_to"], plain["model"]["tables"]
    assert [table.hidden_dim for table in ModelSpec.from_dict(plain, "here").tables] == [8, 8]


@pytest.mark.parametrize(
    ("pooling", "own", "expected"),
    [
        ("mean", {}, "model.pooling is mean, but feature 'weighted' has weights, which need sum pooling; use sum"),
        (
            "sum",
            {"lists": "mean"},
            "the pooling of table 'lists' is mean, but feature 'weighted' has weights, which ne",
        ),
        ("mean", {"*": "sum"}, None),
        ("mean", {"weighted": "sum", "lists": "sum"}, None),  # of single ids the mean is the sum
    ],
)
def test_weights_need_sums_in_all_tables(pooling: Any, own: dict[str, Any], expected: str | None) -> None:
    features = (
        SparseFeature("weighted", 9, multi_valued=True, weighted=True, pooling_factor=2.0),
        SparseFeature("lists", 9, multi_valued=True, pooling_factor=2.0),
        SparseFeature("single", 9),
    )
    tables = {name: TableModelConfig(pooling=each) for name, each in own.items()}
    model = dataclasses.replace(SPEC.model, pooling=pooling, tables=tables)
    spec, wanted = ModelSpec(model, (), features, seed=0), dataclasses.replace(config(), model=model)
    if expected is None:
        assert not any(table.takes_mean for table in spec.with_model(wanted).tables)
    else:
        assert message_of(spec.with_model, wanted).startswith(expected)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    assert message_of(ModelSpec.load, path).startswith(f"{path}: cannot be read: ")
    for content in (b'{"model": ', b"\xff\xfe"):
        path.write_bytes(content)
        assert message_of(ModelSpec.load, path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": None}, "here: not a model description: "),
        ({"sparse": [{"name": "C1"}]}, "here: not a model description: KeyError('num_embeddings')"),
        ({"sparse": 3}, "here: not a model description: "),
        ({"model": {"hiden_dim": 8}}, "here: model.hiden_dim: unknown key (did you mean 'hidden_dim'?)"),
        ({"model": {"hidden_dim": "8"}}, "here: model.hidden_dim: expected a whole number or null, found '8'"),
        ({"model": 8}, "here: model: expected a section of keys, found 8"),
    ],
)
def test_an_invalid_spec_is_refused_with_its_source(change: dict[str, Any], expected: str) -> None:
    assert message_of(ModelSpec.from_dict, SPEC.to_dict() | change, "here").startswith(expected)


@pytest.mark.parametrize("key", ["model", "dense", "sparse", "seed"])
def test_a_spec_that_lacks_a_key_names_it(key: str) -> None:
    plain = {name: value for name, value in SPEC.to_dict().items() if name != key}
    assert message_of(ModelSpec.from_dict, plain, "here") == f"here: not a model description: KeyError('{key}')"
    assert message_of(ModelSpec.from_dict, [plain], "here").startswith("here: not a model description: TypeError")


def test_a_data_set_with_more_columns_than_the_model_is_accepted() -> None:
    SPEC.check_data(schema(C0=5, C1=9, C2=1_234, C3=7), HERE)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            schema(("I1", "I3"), C1=9, C2=1_234),
            "some/data: the model takes the dense column 'I2', which this data set lacks",
        ),
        (schema(C2=1_234), "some/data: the model takes the feature 'C1', which this data set lacks"),
        (
            schema(C1=9, C2=1_235),
            "some/data: feature 'C2' has 1,235 ids here, but the model's table has 1,234 rows; use the data set that "
            "the model was trained on, or prepare this one with --like and that data set",
        ),
        (schema(C1=8, C2=1_234), "some/data: feature 'C1' has 8 ids here, but the model's table has 9 rows; "),
    ],
    ids=["dense", "sparse", "more ids", "fewer ids"],
)
def test_a_data_set_that_does_not_fit_is_refused(found: DatasetSchema, expected: str) -> None:
    assert message_of(SPEC.check_data, found, HERE).startswith(expected)


def test_seed_and_features_make_specs_differ() -> None:
    assert dataclasses.replace(SPEC, seed=4) != SPEC
    assert dataclasses.replace(SPEC, sparse=SPEC.sparse[::-1]) != SPEC


LISTS = SparseFeature("genres", 20, multi_valued=True, pooling_factor=2.5)
WEIGHTED = SparseFeature("tags", 30, multi_valued=True, weighted=True, pooling_factor=0.5)


def with_lists() -> DatasetSchema:
    sparse = (SparseFeature("C1", 9), LISTS, WEIGHTED)
    whole = schema(C1=9, genres=20, tags=30)
    return dataclasses.replace(whole, sparse=sparse)


def test_lists_and_weights_are_those_of_the_data_set() -> None:
    spec = ModelSpec.of(config(), with_lists())
    assert spec.sparse == (SparseFeature("C1", 9), LISTS, WEIGHTED)
    assert spec.is_weighted
    assert spec.pooling_factors == {"C1": 1.0, "genres": 2.5, "tags": 0.5}
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())), "here") == spec
    assert not ModelSpec.of(config(sparse_features=("genres", "C1")), with_lists()).is_weighted


def test_mean_pooling_of_a_weighted_feature_is_refused() -> None:
    averaging = dataclasses.replace(config(), model=ModelConfig(pooling="mean"))
    message = message_of(ModelSpec.of, averaging, with_lists())
    assert message.startswith("model.pooling is mean, but feature 'tags' has weights")
    without = dataclasses.replace(averaging, data=DataConfig(path="logs", sparse_features=("C1", "genres")))
    assert ModelSpec.of(without, with_lists()).model.pooling == "mean"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"multi_valued": False, "weighted": False}, "holds one id a row here and lists of ids with weights in"),
        ({"weighted": False}, "holds lists of ids without weights here and lists of ids with weights in the model's"),
    ],
)
def test_a_feature_of_another_kind_does_not_fit(found: dict[str, Any], expected: str) -> None:
    spec = ModelSpec.of(config(), with_lists())
    other = dataclasses.replace(
        with_lists(), sparse=(SparseFeature("C1", 9), LISTS, dataclasses.replace(WEIGHTED, **found))
    )
    assert message_of(spec.check_data, other, HERE).startswith(f"some/data: feature 'tags' {expected}")
    denser = dataclasses.replace(WEIGHTED, pooling_factor=9.0)  # other rows of the same kind
    spec.check_data(dataclasses.replace(with_lists(), sparse=(SparseFeature("C1", 9), LISTS, denser)), HERE)


def changed(kind: str, name: str, **rules: Any) -> DatasetSchema:
    whole = schema(C1=9, C2=1_234)
    columns = getattr(whole.preprocessing, kind)
    made = dataclasses.replace(whole.preprocessing, **{kind: columns | {name: columns[name] | rules}})
    return dataclasses.replace(whole, preprocessing=made)


def test_a_data_set_whose_columns_were_made_differently_is_refused() -> None:
    assert SPEC.check_data(changed("dense", "I3", transform="raw"), HERE) is None  # the model does not take it
    assert message_of(SPEC.check_data, changed("dense", "I2", mean=2.5), HERE) == (
        f"some/data: dense column I2 has mean 2.5 here and mean 3.125 in the model's data set; {LIKE_REMEDY}"
    )
    assert message_of(SPEC.check_data, changed("sparse", "C1", vocabulary="another"), HERE) == (
        "some/data: the ids of sparse feature C1 belong to another vocabulary here than in the model's data set; "
        f"{LIKE_REMEDY}"
    )
    SPEC.check_ids(changed("dense", "I2", mean=2.5), HERE)
    assert "C1 belong to another" in message_of(SPEC.check_ids, changed("sparse", "C1", vocabulary="another"), HERE)


def test_a_data_set_whose_vocabulary_has_grown_is_accepted_with_the_ids_that_the_model_knows() -> None:
    """And so is the one from which that of the model has grown, of which it knows all ids."""
    before = schema(C1=9, C2=1_234).preprocessing
    extended = grown_from(before.sparse["C2"])
    rules = before.sparse | {"C2": before.sparse["C2"] | {"vocabulary": "later", "extends": extended}}
    data = dataclasses.replace(schema(C1=9, C2=2_000), preprocessing=dataclasses.replace(before, sparse=rules))
    assert SPEC.check_data(data, HERE) is None
    SPEC.check_ids(data, HERE)
    assert SPEC.known_ids(data) == {"C2": 1_234}
    later = ModelSpec.of(config(), data)
    earlier = schema(C1=9, C2=1_234)
    assert later.check_data(earlier, HERE) is None
    assert later.known_ids(earlier) == {}
    apart = dataclasses.replace(data, preprocessing=before)
    assert "feature 'C2' has 2,000 ids here" in message_of(SPEC.check_data, apart, HERE)
    plain = {key: value for key, value in SPEC.to_dict().items() if key != "preprocessing"} | {"vocabulary_id": "one"}
    old = ModelSpec.from_dict(plain, "here")
    assert old.check_data(dataclasses.replace(data, vocabulary_id="two", extends=("zero", "one")), HERE)
    assert "feature 'C2' has" in message_of(old.check_data, dataclasses.replace(data, extends=("zero",)), HERE)


def test_a_model_that_does_not_record_how_columns_were_made_is_compared_by_ids_with_a_warning() -> None:
    plain = SPEC.to_dict() | {"vocabulary_id": "one"}
    del plain["preprocessing"]
    old = ModelSpec.from_dict(plain, "here")
    assert old.preprocessing is None
    data = dataclasses.replace(schema(C1=9, C2=1_234), vocabulary_id="one")
    assert (old.check_data(data, HERE) or "").startswith(
        "the model does not record how its dense columns and its label"
    )
    other = dataclasses.replace(data, vocabulary_id="other")
    for check in (old.check_data, old.check_ids):
        assert message_of(check, other, HERE).startswith(
            "some/data: its ids belong to another vocabulary than those of"
        )


def test_a_spec_whose_preprocessing_lacks_a_column_is_refused() -> None:
    plain = SPEC.to_dict()
    del plain["preprocessing"]["dense"]["I1"]
    assert message_of(ModelSpec.from_dict, plain, "here") == "here: not a model description: KeyError('I1')"
