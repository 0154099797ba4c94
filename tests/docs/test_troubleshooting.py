"""The messages that docs/troubleshooting.md explains are those of the code."""

import ast
import re
from functools import cache

import pytest

from mlet_dist import errors
from tests.helpers.mlet_command import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [text.strip() for _, text in re.findall(r"^- (`+)(.+?)\1$", PAGE, re.MULTILINE)]


@cache
def code_texts() -> tuple[str, ...]:
    """All texts in the code, an ellipsis for each value that is formatted into one."""
    texts = []
    for path in (ROOT / "mlet_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_of_the_code(message: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…")]
    pattern = re.compile(".*?".join(pieces))
    assert any(pattern.search(text) for text in code_texts()), message


def test_the_page_explains_every_error_class_and_its_exit_code() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
    ]
    assert len(kinds) >= 4
    for kind in kinds:
        default = 2 if issubclass(kind, errors.UserError) else 1
        assert f"| {getattr(kind, 'EXIT_CODE', default)} | `{kind.__name__}` |" in PAGE, kind
