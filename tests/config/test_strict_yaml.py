import math
import os
import socket
import time
from pathlib import Path

import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.config.strict_yaml import TextLoader, comment_in, load_yaml, parse_yaml
from mlet_dist.errors import UserError


def doubled(levels: int, line: str) -> str:
    """Return a document in which each of many levels names the one before twice, written as ``line``."""
    lines = ["l0: &l0 {k0: 1, j0: 2}"]
    lines += [line.replace("NEW", f"l{n}").replace("OLD", f"l{n - 1}") for n in range(1, levels)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "lists of aliases": doubled(60, "NEW: &NEW [*OLD, *OLD]"),
    "mappings of aliases": doubled(60, "NEW: &NEW {a: *OLD, b: *OLD}"),
    "lists of merges": doubled(60, "NEW: &NEW {<<: [*OLD, *OLD]}"),
    "merges of merges": doubled(60, "NEW: &NEW {<<: [*OLD, *OLD], kNEW: 1}"),
    "a wide one": "a: &a [" + "x," * 2000 + "]\nb: &b [" + "*a," * 2000 + "]\n",
    "keys": doubled(60, "NEW: &NEW {? [*OLD, *OLD] : 1}"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_aliases_that_expand_without_end_are_refused_at_once(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[bomb])
    started = time.monotonic()
    with pytest.raises(UserError, match=r"not valid YAML in line 1: its aliases stand for more than 1,000,000 values$"):
        load_yaml(path, "config")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: *a}", "a: &a {<<: *a}", "a: &a [{b: [*a]}]"])
def test_a_value_that_contains_itself_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a value contains itself"):
        parse_yaml(text)


def test_aliases_and_merge_keys_of_ordinary_size_are_read() -> None:
    text = "base: &base {a: 1, b: &list [1, 2]}\none: {<<: *base, c: *list}\nmany: [" + "*list," * 1000 + "]\n"
    content = parse_yaml(text)
    assert content["one"] == {"a": 1, "b": [1, 2], "c": [1, 2]}
    assert content["many"] == 1000 * [[1, 2]]


@pytest.mark.parametrize(
    "text", ["!!bool x", "!!int ''", "!!timestamp x", "!!float x", "!!binary é", "!!set [1]", "!no x"]
)
def test_a_tag_that_does_not_fit_is_not_valid(text: str) -> None:
    with pytest.raises(ValueError, match=r"^( in line 1)?: "):
        parse_yaml(text)


def test_plain_values_are_text_where_text_is_wanted() -> None:
    assert parse_yaml("[1, null, yes, ~, 1.5, '2', !!int 3]", TextLoader) == ["1", "null", "yes", "~", "1.5", "2", 3]


@pytest.mark.parametrize(
    ("text", "comment"),
    [
        ("3 # x", "# x"), ("3 #", "#"), ("# x\n3", "# x"), ("[1, # y\n2]", "# y"), ("3", None), ("'a # b'", None),
        ("a#b", None), ("{a: b}", None), ("--- 3\n...", None), ("|\n a # b", None), ("", None),
    ],
)  # fmt: skip
def test_comments_are_found(text: str, comment: str | None) -> None:
    assert comment_in(text) == comment


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        kinds = {fifo: "a FIFO", link: "a FIFO", tmp_path / "socket": "a socket", Path("/dev/zero"): "a device"}
        for path, kind in kinds.items():
            with pytest.raises(UserError) as caught:
                load_config(path)
            assert str(caught.value) == f"{path}: cannot read the config: it is {kind}, and must be a regular file"


def test_a_file_that_is_too_large_for_a_config_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"cannot read the config: it has more than 16,777,216 bytes"):
        load_yaml(path, "config")


def test_a_loop_of_links_and_a_name_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "config.yaml"):
        with pytest.raises(UserError, match="cannot read the config: Too many levels of symbolic links"):
            load_yaml(path, "config")
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(UserError, match="cannot read the config: its name cannot be a file's: "):
            load_yaml(tmp_path / name, "config")


@pytest.mark.parametrize(
    ("text", "number"), [("010", "8"), ("[1, -0123]", "-83"), ("{a: 1:30}", "90"), ("1:30.5", "90.5"), ("01_0", "8")]
)
def test_numbers_of_base_8_and_60_are_refused_and_what_they_are_is_said(text: str, number: str) -> None:
    with pytest.raises(ValueError, match=rf"in line 1: .* is the number {number} in YAML; write that number, or"):
        parse_yaml(text)


def test_other_numbers_and_quoted_ones_are_read() -> None:
    text = "[007, 00, 0x10, 1_000, -3, +4, 1.5, .inf, '010', \"1:30\", 2024-01-05T10:30:00Z]"
    *numbers, time = parse_yaml(text)
    assert numbers == [7, 0, 16, 1000, -3, 4, 1.5, math.inf, "010", "1:30"]
    assert time.hour == 10
    assert parse_yaml("[010, 1:30]", TextLoader) == ["010", "1:30"]
