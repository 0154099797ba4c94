"""YAML of names, texts and lists, in quotes wherever a reader might take a text for something else; ranges of names."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

# Also texts that only YAML 1.1, or only YAML 1.2, takes for a boolean, a null or a number.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_WORDS = frozenset(("y", "n", "yes", "no", "true", "false", "on", "off", "null", "nan", "inf"))
_WIDTH = 116


def yaml_scalar(value: Any) -> str:
    """Return a text, number or boolean as YAML on one line; texts stay texts."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value) if not isinstance(value, float) or "e" not in repr(value) else f"{value:.17f}".rstrip("0")
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return str(value)
    return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**30)).rstrip("\n")


def yaml_list(values: Sequence[Any], indent: int) -> str:
    """Return a list in brackets, in lines that are indented by ``indent`` spaces after the first one."""
    lines, line = [], "["
    for i, value in enumerate(values):
        text = yaml_scalar(value) + ("," if i + 1 < len(values) else "]")
        if len(line) > 1 and indent + len(line) + len(text) > _WIDTH:
            lines.append(line.rstrip())
            line = " "
        line += text + " "
    return f"\n{' ' * indent}".join([*lines, line.rstrip()])


def yaml_value(value: Any, indent: int) -> str:
    """Return a scalar, a list of scalars, or a mapping of scalars, on one line if it fits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_scalar(key)}: {yaml_plain(each)}" for key, each in value.items()) + "}"
    return yaml_list(value, indent) if isinstance(value, list) else yaml_scalar(value)


def yaml_plain(value: Any) -> str:
    """Return a fraction such as 1/3 without quotes, which YAML reads as text, or any other scalar."""
    return str(value) if re.fullmatch(r"[0-9]+/[0-9]+", str(value)) else yaml_scalar(value)


def ranges(names: Sequence[str]) -> list[str]:
    """Return names with C1..C26 in place of three or more that are numbered without gaps."""
    found: list[str] = []
    start = 0
    while start < len(names):
        stop = start + 1
        while stop < len(names) and _follows(names[stop - 1], names[stop], names[start]):
            stop += 1
        found += [f"{names[start]}..{names[stop - 1]}"] if stop - start > 2 else names[start:stop]
        start = stop
    return found


def _follows(before: str, name: str, first: str) -> bool:
    """Return whether a name continues the range that begins with ``first``, as the description expands it."""
    parts = [re.fullmatch(r"(.*?)([0-9]+)", each) for each in (before, name, first)]
    if any(part is None or not part[2].isascii() for part in parts):
        return False
    left, right, begin = (part for part in parts if part is not None)
    digits = len(begin[2]) if begin[2].startswith("0") else 0
    expected = f"{left[1]}{int(left[2]) + 1:0{digits}}"
    return (
        left[1] == right[1] and ".." not in name and name == expected and before == f"{left[1]}{int(left[2]):0{digits}}"
    )


def can_be_listed(name: str) -> bool:
    """Return whether ``columns`` takes a name for itself rather than for a range or a pattern."""
    return ".." not in name and not set(name) & set("*?[")
