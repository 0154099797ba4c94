"""Reads YAML strictly: no duplicate keys or surprising numbers, no endless aliases, no file on which a read waits."""

from pathlib import Path
from typing import Any

import yaml

from mlet_dist.errors import UserError
from mlet_dist.regular_file import read_regular_file

_MAX_BYTES = 16 << 20  # PyYAML reads about 100 kB/s
_MAX_ALIASED = 1_000_000  # values that aliases (`*name`) and merge keys (`<<`) may add


def load_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file without duplicate keys.

    Args:
        what: what to call the file's content in messages, e.g. ``config``.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    try:
        return parse_yaml(read_regular_file(path, _MAX_BYTES).decode())
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML{error}") from None


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, of which YAML readers otherwise silently keep the last.

    It also refuses a document whose aliases stand for more than a million values: a few lines of nested aliases or
    merge keys would take hours and all memory.
    """

    def compose_document(self) -> yaml.Node | None:
        node: yaml.Node | None = super().compose_document()
        if node is not None:
            sizes: dict[int, int] = {}
            if _expanded_size(node, sizes) - len(sizes) > _MAX_ALIASED:
                raise yaml.MarkedYAMLError(
                    problem=f"its aliases stand for more than {_MAX_ALIASED:,} values", problem_mark=node.start_mark
                )
        return node

    # This runs before merge keys (`<<`) are resolved: keys that they bring in may be given again.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """Return a number; refuse 010 and 1:30, which YAML reads as 8 and 90, not as what people mean by them."""
        integer = node.tag.endswith(":int")
        value: int | float = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
        text = str(node.value).replace("_", "")
        if ":" in text or (integer and text.lstrip("+-").isdecimal() and int(text) != value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is the number {value} in YAML; write that number, or put text in quotes",
                problem_mark=node.start_mark,
            )
        return value


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.construct_decimal)


class TextLoader(StrictLoader):
    """A StrictLoader whose plain values are all text: ``[1, null, yes]`` holds three texts."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as PyYAML declares it


def parse_yaml(text: str, loader: type[StrictLoader] = StrictLoader) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: the text is not valid YAML. The message is where and why, e.g. `` in line 3: …``.
    """
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # a date such as 2024-13-45
        raise ValueError(f": {error}") from None
    except (KeyError, IndexError, AttributeError, TypeError):  # PyYAML's own, for `!!bool 3` or `!!int ""`
        raise ValueError(": a value does not fit its tag") from None
    except RecursionError:
        raise ValueError(": it is nested too deeply") from None


def comment_in(text: str) -> str | None:
    """Return the first comment in a valid YAML text, or None."""
    end = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        between = text[end : token.start_mark.index].strip()
        if between:
            return between
        end = token.end_mark.index
    return None


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values with every alias replaced by what it stands for; ``sizes`` holds each node's."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
    sizes[id(node)] = 1 + sum(_expanded_size(each, sizes) for each in inner)
    return sizes[id(node)]
