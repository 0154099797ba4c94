"""Which settings may change between two jobs of a run, and which are refused by name."""

import dataclasses
import json
from typing import Any

import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.resume import check_same_run, identity_of, without_learning_rates
from tests.helpers.mlet_command import ROOT

MADE = Preprocessing(
    {"column": "click"}, {"I1": {"transform": "standardise", "mean": 3.125}}, {"C1": {"encoding": "vocabulary"}}
)


def identity(
    *overrides: str,
    rows: int = 9,
    vocabulary_id: str = "v",
    content_id: str = "c",
    preprocessing: Preprocessing | None = MADE,
) -> dict[str, Any]:
    config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", overrides)
    features = (SparseFeature("C1", rows),)
    spec = ModelSpec(config.model, ("I1",), features, config.train.seed, vocabulary_id, preprocessing)
    spec = spec.with_model(config)
    plain: dict[str, Any] = json.loads(json.dumps(identity_of(config, spec, content_id)))  # as a checkpoint holds it
    return plain


@pytest.mark.parametrize(
    "override",
    [
        "sharding.exchange=reduce_scatter",
        "sharding.sharding_types=[table_wise]",
        "sharding.forward_comm=fp16",
        "data.eval_batch_size=7",
        "data.path=elsewhere",
        "data.reader_threads=3",
        "data.shuffle_buffer=77",  # of no consequence unless rows are shuffled
        "train.device=cpu",
        "train.pipelined=false",
        "train.log_every=3",
        "train.checkpoint_every=3",
        "train.epochs=3",
        "train.max_steps=5",
        "run.dir=elsewhere",
    ],
)
def test_what_does_not_change_the_weights_may_change(override: str) -> None:
    assert identity(override) == identity()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.embedding_dim=8", "model.embedding_dim was 16, is 8"),
        ("model.hidden_dim=null", "model.hidden_dim was 64, is null"),
        ("model.projection_init=orthogonal", 'model.projection_init was null, is "orthogonal"'),
        ("model.top_mlp=[8]", r"model.top_mlp was \[512, 256\], is \[8\]"),
        ("optimizer.name=adam", 'optimizer.name was "sgd", is "adam"'),
        ("optimizer.learning_rate=0.3", "optimizer.learning_rate was 0.2, is 0.3"),
        ("data.batch_size=64", "data.batch_size was 128, is 64"),
        ("data.shuffle=true", "data.shuffle was false, is true"),
        ("train.seed=1", "train.seed was 0, is 1"),
        ("sharding.rows_dtype=fp16", 'rows_dtype of table C1 was "fp32", is "fp16"'),
    ],
)
def test_what_changes_the_weights_is_named(override: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"^here was saved with other settings: .*{key}.*; change them back, or go$"):
        check_same_run(identity(), identity(override), "here", "go")


def test_other_tables_and_vocabularies_are_named() -> None:
    with pytest.raises(UserError, match=r"rows of table C1 was 9, is 8; the data set.s vocabulary_id was .v., is .w."):
        check_same_run(identity(), identity(rows=8, vocabulary_id="w"), "here", "go")
    with pytest.raises(UserError, match=r"the training split's files, by fingerprint, was .c., is .d."):
        check_same_run(identity(), identity(content_id="d"), "here", "go")


def test_the_number_of_steps_counts_where_learning_rates_fall() -> None:
    falling = ("optimizer.decay=linear",)
    assert identity(*falling, "train.epochs=2") != identity(*falling)
    assert without_learning_rates(identity(*falling, "train.epochs=2")) == without_learning_rates(identity())
    assert without_learning_rates(identity("optimizer.name=adam")) != without_learning_rates(identity())


def test_columns_that_were_made_differently_are_named() -> None:
    for key, name, rules, expected in (
        (
            "dense",
            "I1",
            {"transform": "raw"},
            'dense column I1 was {"transform": "standardise", "mean": 3.125}, is {"tra',
        ),
        (
            "sparse",
            "C1",
            {"encoding": "hash"},
            'sparse feature C1 was {"encoding": "vocabulary"}, is {"encoding": "hash"}',
        ),
    ):
        other = identity(preprocessing=dataclasses.replace(MADE, **{key: {name: rules}}))
        with pytest.raises(UserError) as caught:
            check_same_run(identity(), other, "here", "go")
        assert expected in str(caught.value)
        for free in (without_learning_rates(identity()), without_learning_rates(other)):
            assert "preprocessing" in free
    other = identity(preprocessing=dataclasses.replace(MADE, label={"column": "buy"}))
    with pytest.raises(UserError, match=r'the label was {"column": "click"}, is {"column": "buy"}'):
        check_same_run(identity(), other, "here", "go")


def test_a_checkpoint_that_does_not_record_it_is_compared_by_the_training_split_alone() -> None:
    old = {key: value for key, value in identity().items() if key != "preprocessing"}
    check_same_run(old, identity(), "here", "go")
    with pytest.raises(UserError, match=r"the training split's files, by fingerprint, was .c., is .d."):
        check_same_run(old, identity(content_id="d"), "here", "go")


def test_settings_of_tables_are_compared_by_what_they_mean() -> None:
    """The table of 9 rows has a single layer by default; an earlier version gave it two."""

    def found(*overrides: str) -> dict[str, Any]:
        return identity("model.projection_init_std=null", *overrides)

    earlier = found("model.single_layer_up_to=0")
    assert found("model.single_layer_up_to=8") == found("model.tables.C1.hidden_dim=64") == earlier
    assert not any("single_layer_up_to" in key or "tables" in key for key in earlier)
    assert found("model.single_layer_up_to=9") == found("model.tables.C?.hidden_dim=null") == found()
    with pytest.raises(UserError) as caught:
        check_same_run(earlier, found(), "here", "go")
    assert str(caught.value) == (
        'here was saved with other settings: layers of table C1 was null, is {"hidden_dim": null}; change them back, '
        "or set model.single_layer_up_to=0 if all tables had two layers, or go"
    )
    with pytest.raises(UserError, match=r'own settings of table C1 was \{"pooling": "mean"\}, is null; change'):
        check_same_run(found("model.tables.C1.pooling=mean"), found(), "here", "go")
