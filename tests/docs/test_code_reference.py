"""The pages generated from the code name all settings and commands, and pages name no setting that does not exist."""

import re
import sys
from pathlib import Path

import pytest

from mlet_dist.cli.main import main
from mlet_dist.config.config_file import Config
from mlet_dist.config.setting_help import describe_keys
from tests.helpers.mlet_command import ROOT

pytest.importorskip("sphinx")
sys.path.append(str(ROOT / "docs" / "_extensions"))

import code_reference

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_settings_page_has_what_the_help_text_has() -> None:
    page = code_reference.settings_as_markdown()
    described = re.findall(r"^ +(\w+\.\w+) \((?:default )?(.*?)\)(?::|$)", describe_keys(Config), re.MULTILINE)
    assert len(described) > 40
    for key, default in described:
        entry = re.search(rf":::{{setting}} {re.escape(key)}\n(.*?):::", page, re.DOTALL)
        assert entry is not None, key
        assert ("required" if default == "required" else f"default `{default}`") in entry[1], key


def test_the_commands_page_has_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    page = code_reference.commands_as_markdown()
    for name in code_reference.commands():
        section = re.search(rf"^## mlet {name}\n(.*?)(?=^\(mlet-|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        with pytest.raises(SystemExit):
            main([name, "--help"])
        options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
        assert {f"--{option}" for option in re.findall(r"{option} --([\w-]+)", section[1])} == options - {"--json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_a_page_names_exist(page: Path) -> None:
    keys = {key for key, _ in code_reference.settings()}
    # Words in `data.`, `model.` and `run.` are often files or attributes.
    named = re.findall(r"`((?:optimizer|sharding|train)\.[a-z]\w+)(?:=[^`]*)?`", page.read_text(encoding="utf-8"))
    assert set(named) - {"train.txt", "train.gz", "train.yaml", "optimizer.step"} <= keys
