"""The settings of validation need one another, and a split of the data set."""

from pathlib import Path

import pytest

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.config.validation_settings import check_validation_split, metrics_to_choose_by
from mlet_dist.errors import UserError


def config_of(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: logs}\nrun: {dir: out}\n")
    return load_config(path, overrides)


@pytest.mark.parametrize(("value", "expected"), [("epoch", "epoch"), ("250", 250), ("null", None)])
def test_validations_come_every_so_many_steps_or_each_epoch(tmp_path: Path, value: str, expected: object) -> None:
    assert config_of(tmp_path, f"train.validate_every={value}").train.validate_every == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.validate_every=often"], "expected a whole number or epoch or null, found often"),
        (["train.validate_every=0"], "train.validate_every is 0, it must be at least 1"),
        (["train.validate_every=1.5"], "expected a whole number or epoch or null, found 1.5"),
        (["train.validation_share=0"], "train.validation_share is 0, it must be a finite number above 0"),
        (["train.validation_share=1.01"], "train.validation_share is 1.01, it must be at most 1"),
        (
            ["train.validate_every=9", "train.keep_best=loss"],
            "expected auc, logloss, one of these of a label, as click_auc, or null, found loss (did you mean",
        ),
        (
            ["train.keep_best=auc"],
            "train.keep_best is auc, which needs train.validate_every, and that is null; set it, for example to 1000",
        ),
        (
            ["train.validate_every=9", "train.patience=2"],
            "train.patience is 2, which needs train.keep_best, and that is null; set it, for example to logloss",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, *overrides)
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


def test_a_share_without_validations_is_a_warning(tmp_path: Path) -> None:
    expected = ["train.validation_share has no effect, because train.validate_every is null"]
    assert config_of(tmp_path, "train.validation_share=0.5").warnings() == expected
    assert config_of(tmp_path, "train.validation_share=0.5", "train.validate_every=epoch").warnings() == []


def test_the_data_set_has_what_is_validated(tmp_path: Path) -> None:
    by_auc = config_of(tmp_path, "train.validate_every=epoch", "train.keep_best=auc").train
    by_loss = config_of(tmp_path, "train.validate_every=epoch", "train.keep_best=logloss").train
    off = config_of(tmp_path).train
    for rows in ({"train": 5}, {"train": 5, "valid": 0}):
        check_validation_split(off, "logs", rows, {})
        with pytest.raises(UserError, match=r"train\.validate_every is epoch, and logs has no rows of a split valid"):
            check_validation_split(by_loss, "logs", rows, {})
    for positives in (0, 4):
        counts = {"valid": {"label": (positives, 4)}}
        check_validation_split(by_loss, "logs", {"valid": 4}, counts)
        with pytest.raises(
            UserError, match=r"train\.keep_best is auc, and all rows of valid in logs have the same label"
        ):
            check_validation_split(by_auc, "logs", {"valid": 4}, counts)
    check_validation_split(by_auc, "logs", {"valid": 4}, {"valid": {"label": (1, 4)}})


def test_of_several_labels_one_is_chosen_by(tmp_path: Path) -> None:
    assert metrics_to_choose_by(("label",)) == {"auc": "auc", "logloss": "logloss"}
    found = metrics_to_choose_by(("click", "buy"))
    assert (found["auc"], found["buy_logloss"], len(found)) == ("click_auc", "buy_logloss", 6)
    counts = {"valid": {"click": (2, 4), "buy": (0, 2)}}
    for best in ("auc", "click_auc", "buy_logloss"):
        config = config_of(tmp_path, "train.validate_every=epoch", f"train.keep_best={best}")
        config.check_labels(["click", "buy"])
        check_validation_split(config.train, "logs", {"valid": 4}, counts)
    by_buy = config_of(tmp_path, "train.validate_every=epoch", "train.keep_best=buy_auc")
    with pytest.raises(UserError, match=r"keep_best is buy_auc, and all rows.*set train\.keep_best=buy_logloss"):
        check_validation_split(by_buy.train, "logs", {"valid": 4}, counts)
    with pytest.raises(UserError, match=r"expected one of auc, logloss or null, found buy_auc"):
        by_buy.check_labels(["label"])
    for weights, message in {
        "{sale: 2}": "has no label 'sale'; it has click, buy",
        "{click: 0, buy: 0.0}": "is 0 for all labels",
    }.items():
        with pytest.raises(UserError, match=message):
            config_of(tmp_path, f"train.label_weights={weights}").check_labels(["click", "buy"])
    with pytest.raises(UserError, match="has one label; leave it out"):
        config_of(tmp_path, "train.label_weights.click=2").check_labels(["label"])
    with pytest.raises(UserError, match=r"train\.label_weights\.click is -1, it must be at least 0"):
        config_of(tmp_path, "train.label_weights.click=-1")
