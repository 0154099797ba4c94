"""Tests of mlet_dist.errors."""

import pickle

import pytest

from mlet_dist.errors import UserError, one_line, print_warning


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("day.tsv: line 3: é 'x\\n' …", "day.tsv: line 3: é 'x\\n' …"),
        ("a\nb\r\nc", "a b c"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("1\t2\x00", "1\\t2\\x00"),
        ("left\u202eright", "left\\u202eright"),
        ("day\udcff", "day\\udcff"),  # a file's name that is not UTF-8
    ],
)
def test_a_message_is_one_line_without_control_characters(text: str, shown: str) -> None:
    error = UserError(text)
    assert one_line(text) == str(error) == str(pickle.loads(pickle.dumps(error))) == shown
    assert one_line(shown) == shown


def test_a_warning_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_warning("day.tsv: a\nb\x1b")
    assert capsys.readouterr() == ("", "mlet: warning: day.tsv: a b\\x1b\n")
