"""The keys of a config file with their defaults and meanings, for `--help`."""

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from mlet_dist.config.parser import section_type, to_yaml

_HELP_COLUMNS = 120


def describe_keys(kind: type) -> str:
    """Return every key of a config dataclass with its default and meaning, wrapped to the width of the terminal."""
    width = min(shutil.get_terminal_size().columns, _HELP_COLUMNS)
    lines = []
    for name, setting in _keys(kind, ""):
        lines.append(f"  {name} ({_default(setting)})")
        meaning = setting.metadata["meaning"]
        lines += textwrap.wrap(
            meaning, width, initial_indent=8 * " ", subsequent_indent=8 * " ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _keys(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for setting in dataclasses.fields(kind):
        section = section_type(setting)
        if section is None:
            yield f"{prefix}{setting.name}", setting
        else:
            yield from _keys(section, f"{prefix}{setting.name}.")


def _default(setting: dataclasses.Field[Any]) -> str:
    """Return ``default`` and the default as YAML writes it, or ``required``."""
    if setting.default is not dataclasses.MISSING:
        return f"default {to_yaml(setting.default)}"
    if setting.default_factory is not dataclasses.MISSING:
        return f"default {to_yaml(setting.default_factory())}"
    return "required"
