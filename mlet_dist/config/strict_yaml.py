"""YAML files in which no key is given twice."""

from pathlib import Path
from typing import Any

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
