"""Frozen dataclasses from YAML: no key is given twice, and every key, type and limit is checked."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from mlet_dist.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, which YAML readers otherwise drop in silence."""

    # Before merge keys (`<<`) are resolved: what they bring in may be given again.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def load_yaml(path: Path, what: str) -> Any:
    """The content of a file, in which no key is given twice.

    Args:
        what: what the file holds, for messages, e.g. ``config``.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML{error}") from None


def parse_yaml(text: str) -> Any:
    """What the text says; a ValueError tells where and why it is not valid YAML, as `` in line 3: …``."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    except ValueError as error:  # a date such as 2024-13-45
        raise ValueError(f": {error}") from None
    except RecursionError:
        raise ValueError(": it is nested too deeply") from None


_SHOWN_CHARACTERS = 200


def setting(meaning: str, default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field: its meaning for `mlet train --help`, and its limits.

    These are at_least, at_most, above, below (which goes with above), multiple_of and min_length.
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


def parse_section(
    kind: type, settings: Any, prefix: str, source: str, sources: Mapping[str, str] = types.MappingProxyType({})
) -> Any:
    """Build one config dataclass from plain data, checking every key, type and limit.

    Args:
        kind: the dataclass, e.g. ModelConfig.
        settings: a mapping of its keys.
        prefix: what precedes a key in messages, e.g. ``model.``.
        source: the file named in messages.
        sources: what is named instead for single keys, because they were given elsewhere.

    Raises:
        UserError: a key is unknown, missing, of the wrong type or out of range.
    """
    where = prefix.rstrip(".")
    if not isinstance(settings, Mapping):
        raise UserError(f"{sources.get(where, source)}: {where}: expected a section of keys, found {show(settings)}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            key = f"{prefix}{name}"
            raise UserError(
                f"{sources.get(key, source)}: {one_line(key)}: unknown key{closest(str(name), list(known))}; "
                f"known keys here are {', '.join(known)}"
            )
    values = {}
    for name, setting in known.items():
        key = prefix + name
        nested = section_type(setting)
        if nested is not None:
            section = settings.get(name)
            values[name] = parse_section(nested, {} if section is None else section, f"{key}.", source, sources)
        elif typing.get_origin(setting.type) is dict:
            values[name] = _parse_sections(setting, settings.get(name), key, source, sources)
        elif name in settings:
            values[name] = _convert(settings[name], setting, key, sources.get(key, source))
        elif setting.default is dataclasses.MISSING:
            raise UserError(f"{source}: {key} is missing ({setting.metadata['meaning']}); set it there or as {key}=…")
    return kind(**values)


def _parse_sections(
    setting: dataclasses.Field[Any], named: Any, key: str, source: str, sources: Mapping[str, str]
) -> dict[str, Any]:
    """Sections by name, of the dataclass in the field's type."""
    kind = typing.get_args(setting.type)[1]
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise UserError(f"{sources.get(key, source)}: {key}: expected sections by name, found {show(named)}")
    found = {}
    for name, section in named.items():
        if type(name) is not str:
            raise UserError(f"{sources.get(key, source)}: {key}: expected a name, found {show(name)}; put it in quotes")
        found[name] = parse_section(kind, {} if section is None else section, f"{key}.{name}.", source, sources)
    return found


def section_type(setting: dataclasses.Field[Any]) -> Any:
    """The dataclass of a field that is a section of its own; else None."""
    return setting.type if dataclasses.is_dataclass(setting.type) else None


def _convert(value: Any, setting: dataclasses.Field[Any], key: str, source: str) -> Any:
    is_union = typing.get_origin(setting.type) in (types.UnionType, typing.Union)  # the latter of Literals
    allowed = typing.get_args(setting.type) if is_union else (setting.type,)
    if value is None and type(None) in allowed:
        return None
    kind = next(option for option in allowed if option is not type(None))
    try:
        converted = _as(kind, value)
    except (TypeError, ValueError, OverflowError):
        nullable = " or null" if type(None) in allowed else ""
        quote = "; put it in quotes" if kind is str and value is not None and not isinstance(value, dict | list) else ""
        raise UserError(f"{source}: {key}: expected {_name(kind)}{nullable}, found {show(value)}{quote}") from None
    if isinstance(converted, tuple) and len(converted) < setting.metadata.get("min_length", 0):
        raise UserError(
            f"{source}: {key} is {show(value)}, it must have at least {setting.metadata['min_length']} entry"
        )
    for each in converted if isinstance(converted, tuple) else (converted,):
        at_least, at_most, above = (setting.metadata.get(limit) for limit in ("at_least", "at_most", "above"))
        if at_least is not None and not each >= at_least:  # nor NaN
            raise UserError(f"{source}: {key} is {show(value)}, it must be at least {at_least}")
        if at_most is not None and each > at_most:
            raise UserError(f"{source}: {key} is {show(value)}, it must be at most {at_most}")
        below = setting.metadata.get("below", math.inf)
        if above is not None and not above < each < below:
            limits = "a finite number above {}" if below == math.inf else "above {} and below {}"
            raise UserError(f"{source}: {key} is {show(value)}, it must be {limits.format(above, below)}")
        factor = setting.metadata.get("multiple_of")
        if factor is not None and each % factor:
            raise UserError(
                f"{source}: {key} is {show(value)}, it must be a multiple of {factor}; use {multiples(each, factor)}"
            )
    return converted


def multiples(value: int, factor: int) -> str:
    """The nearest multiples below and above, of at least one factor."""
    lower = value // factor * factor
    return f"{lower} or {lower + factor}" if lower else str(factor)


def _as(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_as(typing.get_args(kind)[0], each) for each in value)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-3 as a string
    if type(value) is not kind:
        raise TypeError
    return value


def _name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if origin is tuple:
        return f"a list, each {_name(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def closest(name: str, known: Sequence[str]) -> str:
    """What to add to a message on an unknown name: the one that may have been meant, if any is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def show(value: Any) -> str:
    """A value in one line, as YAML writes it."""
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return one_line(text.removesuffix("...\n"))


def one_line(text: str) -> str:
    """Text of a user's in one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
