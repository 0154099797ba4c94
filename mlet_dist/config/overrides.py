"""Settings of the command line, ``section.key=value`` or ``key=value``, each value read as its setting's type asks.

Text is what was typed after ``=``, as it is; ``null`` alone leaves an optional text unset. Lists of text are YAML lists
whose entries are all text. Everything else is YAML.
"""

import dataclasses
import types
import typing
from typing import Any

from mlet_dist.config.parser import section_type
from mlet_dist.config.strict_yaml import StrictLoader, TextLoader, comment_in, parse_yaml
from mlet_dist.errors import UserError

COMMAND_LINE = "command line"
_NULL = "null"


def apply_override(
    config: type, settings: dict[str, Any], override: str, sources: dict[str, str], source: str = COMMAND_LINE
) -> None:
    """Write one override into ``settings``, and its source into ``sources``.

    Args:
        config: the dataclass of all sections, and of settings in none.
        settings: the plain data of the config file.
        override: as typed.
        sources: key -> where it was given.
        source: where the override was given.

    Raises:
        UserError: it is not written ``section.key=value``, or ``key=value`` for a setting in no section, or the value
            is not valid YAML.
    """
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    alone = {each.name for each in dataclasses.fields(config) if section_type(each) is None}
    if not (equals and section and (name if dot else section in alone)):
        known = f"; keys without a section are {', '.join(sorted(alone))}" if alone else ""
        raise UserError(
            f"{source}: {override!r}: an override is written section.key=value, for example data.batch_size=256{known}"
        )
    *sections, last = keys = _keys(config, section, name) if dot else [section]
    value = _parse(text, _setting(config, keys), override, source)
    _note(key, value, sources, source)
    path = ""
    for each in sections:
        path = f"{path}.{each}" if path else each
        if each not in settings:
            sources[path] = source
        if settings.get(each) is None:
            settings[each] = {}
        if not isinstance(settings[each], dict):
            return  # parse_section reports it
        settings = settings[each]
    settings[last] = value


def _note(key: str, value: Any, sources: dict[str, str], source: str) -> None:
    """Note the source of a key, and of those in its value."""
    sources[key] = source
    if isinstance(value, dict):
        for name, each in value.items():
            _note(f"{key}.{name}", each, sources, source)


def _keys(config: type, section: str, name: str) -> list[str]:
    """Return the keys from the top down; a table's name, as in ``sharding.tables.C3.exchange``, may contain dots."""
    outer, dot, inner = name.partition(".")
    setting = _setting(config, [section, outer])
    if not dot or setting is None or typing.get_origin(setting.type) is not dict:
        return [section, name]
    if not dataclasses.is_dataclass(typing.get_args(setting.type)[1]):  # values, not sections
        return [section, outer, inner]
    table, dot, last = inner.rpartition(".")
    return [section, outer, table, last] if dot else [section, outer, inner]


def _setting(config: type, keys: list[str]) -> dataclasses.Field[Any] | None:
    """Return the field that the keys name; None if there is none, which parse_section reports."""
    kind: Any = config
    setting = None
    for key in keys:
        if kind is None:
            return None
        if typing.get_origin(kind) is dict:  # key is a table's name
            kind = typing.get_args(kind)[1]
            kind = kind if dataclasses.is_dataclass(kind) else None
            setting = None
            continue
        setting = {each.name: each for each in dataclasses.fields(kind)}.get(key)
        if setting is None:
            return None
        is_dict = typing.get_origin(setting.type) is dict
        kind = setting.type if is_dict else section_type(setting)
    return setting


def _parse(text: str, setting: dataclasses.Field[Any] | None, override: str, source: str) -> Any:
    is_union = setting is not None and typing.get_origin(setting.type) is types.UnionType
    allowed = () if setting is None else typing.get_args(setting.type) if is_union else (setting.type,)
    is_null = type(None) in allowed and text.strip() == _NULL
    if str in allowed:
        return None if is_null else text
    if not text.strip():
        return ""  # not YAML's null, which must be written as null
    is_list_of_text = tuple[str, ...] in allowed
    if is_list_of_text and is_null:
        return None
    try:
        value = parse_yaml(text, TextLoader if is_list_of_text else StrictLoader)
    except ValueError as error:
        advice = "; a name with , : # [ ] { } or quotes in it must be in quotes" if is_list_of_text else ""
        raise UserError(f"{source}: {override!r}: the value is not valid YAML{error}{advice}") from None
    comment = comment_in(text)
    if comment is not None:
        raise UserError(
            f"{source}: {override!r}: {comment!r} is a comment in YAML, which is not read; leave it out, or "
            "put the value in quotes within the argument"
        )
    return value
