"""A mapping of a YAML file whose keys are taken out one by one, each with a check of its value."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from mlet_dist.config.parser import did_you_mean, shorten
from mlet_dist.errors import UserError

REQUIRED = object()  # the default of a key that has none


class Section:
    """A mapping of the YAML file; keys are taken out one by one, and ``end`` raises for any that remain."""

    def __init__(self, path: str, key: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise UserError(
                f"{path}: {key or 'the file'} is {content!r:.80}; it must be a section of `key: value` lines"
            )
        self._path, self._key, self._content = path, key, dict(content)
        self._known: list[str] = []

    @property
    def column(self) -> Any:
        """The value of ``column``, or None."""
        return self._content.get("column")

    def has(self, key: str) -> bool:
        """Return whether the key is given and was not taken yet."""
        return key in self._content

    def is_list(self, key: str) -> bool:
        """Return whether the value of the key is a list."""
        return isinstance(self._content.get(key), list)

    def with_column(self, name: str) -> "Section":
        """Return a section with the same keys and this ``column``."""
        return Section(self._path, self._key, self._content | {"column": name})

    def take(self, key: str, parse: Callable[[Any], Any], default: Any = REQUIRED) -> Any:
        """Return the value of ``key``; ``parse`` raises ValueError with a description of valid values."""
        self._known.append(key)
        if key not in self._content:
            if default is REQUIRED:
                misspelt = [each for each in map(str, self._content) if did_you_mean(each, [key])]
                near = f"; is {shorten(misspelt[0])!r} a misspelling of it?" if misspelt else ""
                raise UserError(f"{self._path}: key {self._within(key)!r} is missing{near}")
            return default if not isinstance(default, str) else self._parsed(key, parse, default)
        return self._parsed(key, parse, self._content.pop(key))

    def section(self, key: str, default: Any = REQUIRED) -> "Section":
        """Return the value of ``key`` as a section."""
        return Section(self._path, self._within(key), self.take(key, lambda value: value, default))

    def sections(self, key: str, default: Any = REQUIRED) -> list["Section"]:
        """Return the value of ``key``, a list, as sections; without a default it must not be empty."""
        entries = self.take(key, _list if default is REQUIRED else _any_list, default)
        return [Section(self._path, f"{self._within(key)}[{i}]", entry) for i, entry in enumerate(entries)]

    def end(self, hints: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise UserError if a key was not taken; ``hints`` holds advice by key."""
        for key in self._content:
            known = ", ".join(self._known)
            hint = hints.get(str(key)) or f"known keys here are {known}"
            raise UserError(
                f"{self._path}: {shorten(self._within(str(key)))} is not a valid key here"
                f"{did_you_mean(str(key), self._known)}; {hint}"
            )

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise UserError for the value of ``key``."""
        raise UserError(f"{self._path}: {self._within(key)} is {value!r:.80}; it must be {expected}")

    def _parsed(self, key: str, parse: Callable[[Any], Any], value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            self.fail(key, value, str(error))

    def _within(self, key: str) -> str:
        return f"{self._key}.{key}" if self._key else key


def check(expected: str, is_valid: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Return a function for ``take`` that returns valid values and raises ValueError for others."""

    def parse(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(expected)
        return value

    return parse


def one_of(*choices: str) -> Callable[[Any], Any]:
    """Return a function for ``take`` that returns these texts alone."""
    return check(" or ".join(choices), lambda value: value in choices)


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not empty."""
    return isinstance(value, str) and value != ""


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) < float("inf")


def is_integer(value: Any, least: int, most: int) -> bool:
    """Return whether a value is a whole number in a range."""
    return type(value) is int and least <= value <= most


_list = check("a list of one entry or more", lambda value: isinstance(value, list) and value != [])
_any_list = check("a list", lambda value: isinstance(value, list))
