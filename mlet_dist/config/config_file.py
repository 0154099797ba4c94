"""Reads and writes a config: YAML <- `section.key=value` overrides, checked as a whole."""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlet_dist.config.parser import load_yaml, parse_section, parse_yaml, section_type, show
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError

_COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as ``data.batch_size=256`` and check every value.

    A leading ``~`` of ``data.path`` and ``run.dir`` becomes the home directory.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing, of the wrong type or out of range.
    """
    source = str(path)
    settings = load_yaml(path, "config")
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected sections such as `model:`, found {show(settings)}")
    sources: dict[str, str] = {}
    for override in overrides:
        _apply_override(settings, override, sources)
    config: Config = parse_section(Config, settings, "", source, sources)
    _check_together(config, source, sources)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=os.path.expanduser(config.data.path)),
        run=dataclasses.replace(config.run, dir=os.path.expanduser(config.run.dir)),
    )


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, so that ``load_config`` reads the same settings back."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def describe_settings() -> str:
    """Every key with its type, default and meaning, one line each."""
    lines = []
    for section in dataclasses.fields(Config):
        for setting in dataclasses.fields(section_type(section)):
            default = show({}) if setting.default is dataclasses.MISSING else show(setting.default)
            if setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING:
                default = "required"
            lines.append(f"  {section.name}.{setting.name} ({default}): {setting.metadata['meaning']}")
    return "\n".join(lines)


def _apply_override(settings: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(
            f"{_COMMAND_LINE}: {override!r}: an override is written section.key=value, for example data.batch_size=256"
        )
    try:
        value = parse_yaml(text) if text.strip() else ""  # not YAML's null: that is to be written out
    except ValueError as error:
        raise UserError(f"{_COMMAND_LINE}: {override!r}: the value is not valid YAML{error}") from None
    sources[key] = _COMMAND_LINE
    *sections, last = key.split(".") if _goes_deeper(key) else (section, name)
    path = ""
    for each in sections:
        path = f"{path}.{each}" if path else each
        if each not in settings:
            sources[path] = _COMMAND_LINE
        if settings.get(each) is None:
            settings[each] = {}
        if not isinstance(settings[each], dict):
            return  # parse_section says so
        settings = settings[each]
    settings[last] = value


def _goes_deeper(key: str) -> bool:
    """Whether the key is of a section by name, such as ``sharding.tables.C3.exchange``."""
    section, _, rest = key.partition(".")
    kind = {each.name: section_type(each) for each in dataclasses.fields(Config)}.get(section)
    if kind is None or "." not in rest:
        return False
    types_of = {each.name: each.type for each in dataclasses.fields(kind)}
    return typing.get_origin(types_of.get(rest.partition(".")[0])) is dict


def _check_together(config: Config, source: str, sources: Mapping[str, str]) -> None:
    for key, names in (
        ("data.dense_features", config.data.dense_features),
        ("data.sparse_features", config.data.sparse_features),
    ):
        if names is not None and (not names or len(set(names)) < len(names)):
            where = sources.get(key, source)
            raise UserError(f"{where}: {key} is {show(names)}; name at least one column, each once, or leave it null")
    start, warmup = config.optimizer.decay_start, config.optimizer.warmup_steps
    if start is not None:
        where = sources.get("optimizer.decay_start", source)
        if config.optimizer.decay == "constant":
            raise UserError(
                f"{where}: optimizer.decay_start is {start}, but optimizer.decay is constant; use linear or cosine"
            )
        if start < warmup:
            raise UserError(
                f"{where}: optimizer.decay_start is {start}, it must be at least optimizer.warmup_steps {warmup}"
            )
    for key, text in (
        ("data.path", config.data.path),
        ("run.dir", config.run.dir),
        ("train.resume", config.train.resume),
        ("train.checkpoint_dir", config.train.checkpoint_dir or "null"),
        ("train.initial_weights", "null" if config.train.initial_weights is None else config.train.initial_weights),
    ):
        if not text.strip():
            raise UserError(f"{sources.get(key, source)}: {key} is empty; it must be a directory")
    if config.train.initial_weights is not None and config.train.resume not in ("auto", "never"):
        raise UserError(
            f"{sources.get('train.initial_weights', source)}: train.initial_weights is {config.train.initial_weights} "
            f"and train.resume {config.train.resume}: a run begins from one of them; leave train.resume at auto"
        )
