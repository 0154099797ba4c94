"""Checks of the values in a data set's JSON files; a wrong one is named with its key and what would be right."""

import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from mlet_dist.data.column_names import NAME_RULE, TABLE_NAME_RULE, is_name, is_table_name
from mlet_dist.data.location import DataPath
from mlet_dist.errors import UserError

_SHOWN_CHARACTERS = 80


def show(value: Any) -> str:
    """Return the value as JSON for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def take(
    path: DataPath, content: dict[str, Any], key: str, is_valid: Callable[[Any], bool], expected: str, within: str = ""
) -> Any:
    """Return ``content[key]``; raise a UserError, which names it ``within + key``, where it is missing or invalid."""
    if key not in content:
        raise UserError(f"{path}: key {within + key!r} is missing; prepare the data set again")
    value = content[key]
    if not is_valid(value):
        raise UserError(f"{path}: {within}{key} is {show(value)}; it must be {expected}")
    return value


def enumerated(key: str, objects: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return each object of a list with the prefix of its keys in messages."""
    return [(f"{key}[{index}].", content) for index, content in enumerate(objects)]


def _is_inside(value: Any) -> bool:
    """Return whether the value is a relative path that does not leave its directory."""
    if not (isinstance(value, str) and value.isprintable()):
        return False
    path = PurePosixPath(value)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts


def is_integer(value: Any, least: int, most: float) -> bool:
    """Return whether the value is a whole number from ``least`` to ``most``; true and false are none."""
    return type(value) is int and least <= value <= most


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


def is_object(value: Any) -> bool:
    """Return whether the value is a JSON object."""
    return isinstance(value, dict)


# The kinds of values: the check, and the description for messages.
TEXT = (lambda value: isinstance(value, str), "text")
TEXTS = (lambda value: _is_list(value, lambda each: isinstance(each, str)), "a list of texts")
OBJECT = (is_object, "an object")
FLAG = (lambda value: isinstance(value, bool), "true or false")
COUNT = (lambda value: is_integer(value, 0, float("inf")), "a whole number, 0 or more")
POOLING_FACTOR = (lambda value: type(value) in (int, float) and 0 <= value < float("inf"), "a number, 0 or more")
SHA256 = (
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "64 hexadecimal digits",
)
NAME = (is_name, f"a column's name: {NAME_RULE}")
TABLE_NAME = (is_table_name, f"a table's name: {TABLE_NAME_RULE}")
NAMES = (lambda value: _is_list(value, is_name), f"a list of columns' names: {NAME_RULE}")
OBJECTS = (lambda value: _is_list(value, is_object), "a list of objects")
FEATURES = (lambda value: value != [] and _is_list(value, is_object), "a list of one object or more")
PART_PATH = (_is_inside, "the path of a file inside the data set's directory")
