"""Builds frozen dataclasses from the plain data of YAML, and checks every key, type and limit."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from typing import Any, Literal

import yaml

from mlet_dist.config.byte_sizes import ByteSize, bytes_of, share_of
from mlet_dist.errors import UserError

_SHOWN_CHARACTERS = 200
_FILE_ALONE: Mapping[str, str] = types.MappingProxyType({})


def setting(meaning: str, default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """Return a dataclass field with the setting's meaning, in full sentences, and its limits.

    Args:
        meaning: for `mlet train --help`, the reference and the comments of `configs/criteo_kaggle.yaml`.
        default: the default; without one the setting is required.
        limits: at_least, at_most, above, below (only with above), multiple_of and min_length.
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


def parse_section(kind: type, settings: Any, prefix: str, source: str, sources: Mapping[str, str] = _FILE_ALONE) -> Any:
    """Build one config dataclass from plain data, checking every key, type and limit.

    Args:
        kind: the dataclass, e.g. ModelConfig.
        settings: a mapping of its keys.
        prefix: the text before each key in messages, e.g. ``model.``.
        source: the file that messages name.
        sources: for keys that were given elsewhere, what messages name instead of ``source``; by default none can be.

    Raises:
        UserError: a key is unknown, missing, of the wrong type or out of range.
    """
    where = prefix.rstrip(".")
    if not isinstance(settings, Mapping):
        raise UserError(f"{sources.get(where, source)}: {where}: expected a section of keys, found {to_yaml(settings)}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            key = f"{prefix}{name}"
            near = did_you_mean(str(name).partition(".")[0], list(known))  # the command line's run.tag.team
            raise UserError(
                f"{sources.get(key, source)}: {shorten(key)}: unknown key{near}; known keys here are {', '.join(known)}"
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
            values[name] = _checked_value(settings[name], setting.type, setting.metadata, key, sources.get(key, source))
        elif setting.default is dataclasses.MISSING:
            meaning = setting.metadata["meaning"].removesuffix(".")
            override = "" if sources is _FILE_ALONE else f" or as {key}=…"
            raise UserError(f"{source}: {key} is missing ({meaning}); set it there{override}")
    return kind(**values)


def _parse_sections(
    setting: dataclasses.Field[Any], named: Any, key: str, source: str, sources: Mapping[str, str]
) -> dict[str, Any]:
    """Return sections by name, each of the dataclass in the field's type, or values of that type; Any is any kind."""
    kind = typing.get_args(setting.type)[1]
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        expected = "sections" if dataclasses.is_dataclass(kind) else "values"
        raise UserError(f"{sources.get(key, source)}: {key}: expected {expected} by name, found {to_yaml(named)}")
    found = {}
    for name, section in named.items():
        if type(name) is not str:
            raise UserError(
                f"{sources.get(key, source)}: {key}: expected a name, found {to_yaml(name)}; put it in quotes"
            )
        inner = f"{key}.{name}"
        if kind is Any:
            found[name] = section
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found[name] = parse_section(kind, {} if section is None else section, f"{inner}.", source, sources)
        else:
            found[name] = _checked_value(section, kind, setting.metadata, inner, sources.get(inner, source))
    return found


def section_type(setting: dataclasses.Field[Any]) -> Any:
    """Return the dataclass of a field that is a section of its own, else None."""
    return setting.type if dataclasses.is_dataclass(setting.type) else None


def _checked_value(value: Any, of_type: Any, limits: Mapping[str, Any], key: str, source: str) -> Any:
    """Return the value as the type; raise UserError if it has another type or is out of the limits of a setting."""
    is_union = typing.get_origin(of_type) in (types.UnionType, typing.Union)  # Union of Literals
    allowed = typing.get_args(of_type) if is_union else (of_type,)
    if value is None and type(None) in allowed:
        return None
    kinds = [option for option in allowed if option is not type(None)]
    try:
        converted = _coerce_to_first(kinds, value)
    except (TypeError, ValueError, OverflowError):
        expected = " or ".join(map(_describe_type, kinds)) + (" or null" if type(None) in allowed else "")
        lists = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
        choices = [
            each for kind in (*kinds, *lists) if typing.get_origin(kind) is Literal for each in typing.get_args(kind)
        ]
        wrong = [each for each in (value if lists and isinstance(value, list) else [value]) if each not in choices]
        near = did_you_mean(wrong[0], choices) if wrong and isinstance(wrong[0], str) else ""
        if lists and not near and value not in (None, "") and not isinstance(value, list | dict):
            near = f"; write [{to_yaml(value)}]"
        quoted = kinds == [str] and value is not None and not isinstance(value, dict | list)
        quote = "; put it in quotes" if quoted else ""
        raise UserError(f"{source}: {key}: expected {expected}, found {to_yaml(value)}{near}{quote}") from None
    if isinstance(converted, tuple) and len(converted) < limits.get("min_length", 0):
        raise UserError(f"{source}: {key} is {to_yaml(value)}, it must have at least {limits['min_length']} entry")
    if ByteSize in kinds and isinstance(converted, str):
        return converted
    for each in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(each, str):
            _check_text(each, key, source)
            continue
        at_least, at_most, above = (limits.get(limit) for limit in ("at_least", "at_most", "above"))
        below = limits.get("below", math.inf)
        if above is not None and not above < each < below:
            expected = "a finite number above {}" if below == math.inf else "above {} and below {}"
            raise UserError(f"{source}: {key} is {to_yaml(value)}, it must be {expected.format(above, below)}")
        if at_least is not None and not each >= at_least:  # nor NaN
            raise UserError(f"{source}: {key} is {to_yaml(value)}, it must be at least {at_least}")
        if at_most is not None and each > at_most:
            unit = "; a size in bytes needs a unit, such as 12GB" if ByteSize in kinds else ""
            raise UserError(f"{source}: {key} is {to_yaml(value)}, it must be at most {at_most}{unit}")
        factor = limits.get("multiple_of")
        if factor is not None and each % factor:
            raise UserError(
                f"{source}: {key} is {to_yaml(value)}, it must be a multiple of {factor}; "
                f"use {nearest_multiples(each, factor)}"
            )
    return converted


def _check_text(text: str, key: str, source: str) -> None:
    """Raise UserError for text that can be neither written to a file as UTF-8 nor be a file's name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: {key} is {text!r}, which is not UTF-8 text; rename what it names") from None
    if "\0" in text:
        raise UserError(f"{source}: {key} is {text!r}, and holds a NUL character, which no name can")


def nearest_multiples(value: int, factor: int) -> str:
    """Return the nearest multiples of ``factor`` below and above, except 0, as text."""
    lower = value // factor * factor
    return f"{lower} or {lower + factor}" if lower else str(factor)


def _coerce_to_first(kinds: Sequence[Any], value: Any) -> Any:
    """Return the value as the first of ``kinds`` that it can be; raise the errors of ``_coerce`` if there is none."""
    for kind in kinds[:-1]:
        with suppress(TypeError, ValueError, OverflowError):
            return _coerce(kind, value)
    return _coerce(kinds[-1], value)


def _coerce(kind: Any, value: Any) -> Any:
    """Return the value as ``kind``; raise TypeError, ValueError or OverflowError if it is of another type."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_coerce(typing.get_args(kind)[0], each) for each in value)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    if kind is ByteSize:
        if not isinstance(value, str):
            raise TypeError
        share = share_of(value)
        if share is not None:
            return share
        bytes_of(value)
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-3 as a string
    if type(value) is not kind:
        raise TypeError
    return value


def _describe_type(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        names = typing.get_args(kind)
        return "one of " + ", ".join(names) if len(names) > 1 else str(names[0])
    if origin is tuple:
        return f"a list, each {_describe_type(typing.get_args(kind)[0])}"
    if kind is ByteSize:
        return "a size such as 12GB, 4GiB or 50%"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: a known name that is similar, if there is one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def to_yaml(value: Any) -> str:
    """Return a value in one line, as YAML writes it."""
    if isinstance(value, tuple):
        value = list(value)
    try:
        text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    except ValueError:  # Python writes whole numbers of up to 4,300 digits, and reads longer ones in hexadecimal
        return "a number of more than 4,300 digits"
    return shorten(text.removesuffix("...\n"))


def shorten(text: str) -> str:
    """Return a user's text in one line, cut off after 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
