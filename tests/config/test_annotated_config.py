"""`configs/criteo_kaggle.yaml` explains every setting with the meaning and the default of its dataclass field."""

import dataclasses
import re

import pytest

from mlet_dist.config.compression_section import CompressionConfig, TableCompressionConfig
from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import section_type
from mlet_dist.config.sharding_section import ShardingConfig, TableShardingConfig
from tests.helpers.annotated_config import annotated
from tests.helpers.mlet_command import ROOT

PATH = ROOT / "configs" / "criteo_kaggle.yaml"
TEXT = PATH.read_text(encoding="utf-8")
SETTINGS = [
    (section.name, setting)
    for section in dataclasses.fields(Config)
    for setting in dataclasses.fields(section_type(section))
]


def test_the_comments_are_the_meanings_and_defaults_of_the_fields() -> None:
    assert annotated(TEXT) == TEXT, f"run `python -m tests.helpers.annotated_config {PATH.relative_to(ROOT)}`"


@pytest.mark.parametrize(("section", "setting"), SETTINGS, ids=lambda each: getattr(each, "name", each))
def test_every_setting_has_a_comment(section: str, setting: dataclasses.Field) -> None:
    (content,) = re.findall(rf"^{section}:.*\n((?:  .*\n)+)", TEXT, re.MULTILINE)
    (comment,) = re.findall(rf"^  {setting.name}: .*?# (.*\n(?: +# .*\n)*)", content, re.MULTILINE)
    text = re.sub(r"\s+(# )?", " ", comment).strip()
    assert text.startswith(setting.metadata["meaning"])
    assert text.removeprefix(setting.metadata["meaning"]) in ("", " Required.", " Default: null.")


@pytest.mark.parametrize(("section", "setting"), SETTINGS, ids=lambda each: getattr(each, "name", each))
def test_a_meaning_is_a_sentence(section: str, setting: dataclasses.Field) -> None:
    assert re.fullmatch(r"\S.+\.", setting.metadata["meaning"])


def test_a_comment_that_disagrees_is_found() -> None:
    assert annotated(TEXT.replace("served; a multiple of 4", "served; a multiple of 8")) == TEXT
    assert "# Rows of a global training batch" in annotated(TEXT)
    with pytest.raises(KeyError, match="keep_last"):
        annotated(re.sub(r"^  keep_last: .*\n", "", TEXT, flags=re.MULTILINE))
    changed = annotated(TEXT.replace("  keep_last: 2 ", "  keep_last: 3 "))
    assert "  keep_last: 3                # Number of the latest checkpoints to keep. Default: 2.\n" in changed


def test_the_settings_of_single_tables_are_those_of_all_tables() -> None:
    meaning = next(each for each in dataclasses.fields(ShardingConfig) if each.name == "tables").metadata["meaning"]
    for setting in dataclasses.fields(TableShardingConfig):
        assert setting.name in meaning
        assert setting.metadata["meaning"] == f"sharding.{setting.name} for this table."


def test_the_limits_of_single_tables_are_named() -> None:
    meaning = next(each for each in dataclasses.fields(CompressionConfig) if each.name == "tables").metadata["meaning"]
    for setting in dataclasses.fields(TableCompressionConfig):
        assert setting.name in meaning
