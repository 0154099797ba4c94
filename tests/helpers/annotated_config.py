"""A config file that explains every setting: its comments are the meanings of the sections in `mlet_dist.config`.

    python -m tests.helpers.annotated_config configs/criteo_kaggle.yaml

writes the comments of the file again. The comment at the top of the file and the values stay as they are.
"""

import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import section_type, to_yaml
from mlet_dist.config.strict_yaml import parse_yaml

_COLUMN, _WIDTH = 30, 120


def annotated(text: str) -> str:
    """Return a config with a comment on every section and setting, in the order of the dataclasses.

    Args:
        text: a config that gives every setting of every section a value on one line.

    Raises:
        KeyError: the config lacks a setting.
    """
    values = {tuple(key): value for *key, value in _values(text)}
    head = text[: re.search(r"^\w", text, re.MULTILINE).start()]
    lines = []
    for section in dataclasses.fields(Config):
        lines += ["", *_commented(f"{section.name}:", section_type(section).__doc__)]
        for setting in dataclasses.fields(section_type(section)):
            value = values.pop((section.name, setting.name))
            comment = " ".join([setting.metadata["meaning"], *_default(setting, value)])
            lines += _commented(f"  {setting.name}: {value}", comment)
    assert not values, f"no settings: {values}"
    return head.rstrip() + "\n" + "\n".join(lines) + "\n"


def _values(text: str) -> list[tuple[str, str, str]]:
    """Return section, key and value, as the file writes it, of every setting."""
    section, found = "", []
    for line in text.splitlines():
        content = re.sub(r"(^| +)#.*", "", line)
        name, _, value = content.partition(":")
        if name.startswith("  "):
            found.append((section, name.strip(), value.strip()))
        elif name:
            section = name
    return found


def _default(setting: dataclasses.Field[Any], value: str) -> list[str]:
    """Return what to say of the default: nothing if it is the value."""
    if setting.default is not dataclasses.MISSING:
        default = setting.default
    elif setting.default_factory is not dataclasses.MISSING:
        default = setting.default_factory()
    else:
        return ["Required."]
    plain = list(default) if isinstance(default, tuple) else default
    return [] if parse_yaml(value) == plain else [f"Default: {to_yaml(default)}."]


def _commented(content: str, comment: str) -> list[str]:
    lines = textwrap.wrap(comment, _WIDTH - _COLUMN - 2, break_on_hyphens=False, break_long_words=False)
    margins = [content.ljust(_COLUMN - 1) + " ", *[" " * _COLUMN] * (len(lines) - 1)]
    return [f"{margin}# {line}" for margin, line in zip(margins, lines, strict=True)]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = annotated(before)
        assert yaml.safe_load(after) == yaml.safe_load(before)
        path.write_text(after, encoding="utf-8")
