"""Settings of the command line: text is taken as typed, everything else is YAML, and nothing is left out silently."""

import re
from pathlib import Path

import pytest

from mlet_dist.config.config_file import Config, load_config, save_config
from mlet_dist.errors import UserError

FILE = "data: {path: logs}\nrun: {dir: out}\n"
TYPED = [
    "exp #1", "a: b", "2024-01-02", "007", "1e3", "0x10", "yes", "null", "Null", "true", "'quoted'", '"so"', "[a, b]",
    "{a: 1}", "*anchor", "&anchor", "!tag", "% percent", "@at", "`tick`", " spaces around ", "a\tb", "-", "?", "|", ">",
    "#", "x#y", "a=b", "ünïcode 数据", "bucket/a b#c", "~user", "a,b", "é: #",
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def error_of(file: Path, override: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def texts(config: Config) -> dict[str, str | None]:
    return {
        "data.path": config.data.path,
        "run.dir": config.run.dir,
        "train.resume": config.train.resume,
        "train.checkpoint_dir": config.train.checkpoint_dir,
        "train.initial_weights": config.train.initial_weights,
    }


@pytest.mark.parametrize("typed", TYPED)
def test_text_is_what_was_typed(typed: str, file: Path, tmp_path: Path) -> None:
    for key in texts(load_config(file)):
        config = load_config(file, [f"{key}={typed}"])
        optional = key in ("train.checkpoint_dir", "train.initial_weights")
        assert texts(config)[key] == (None if optional and typed == "null" else typed)
        save_config(config, tmp_path / "resolved.yaml")
        assert load_config(tmp_path / "resolved.yaml") == config


def test_two_values_that_differ_after_a_hash_sign_stay_apart(file: Path) -> None:
    assert [load_config(file, [f"run.dir=exp #{number}"]).run.dir for number in (1, 2)] == ["exp #1", "exp #2"]


def test_null_alone_unsets_an_optional_text(file: Path) -> None:
    file.write_text(FILE + "train: {checkpoint_dir: elsewhere}\n")
    assert load_config(file, ["train.checkpoint_dir=null"]).train.checkpoint_dir is None
    assert load_config(file, ["train.checkpoint_dir=./null"]).train.checkpoint_dir == "./null"
    for empty in ("", "  "):
        assert "train.checkpoint_dir is empty" in error_of(file, f"train.checkpoint_dir={empty}")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[C1,C2]", ("C1", "C2")),
        ("[1, null, yes, 2024-01-02, 1.5]", ("1", "null", "yes", "2024-01-02", "1.5")),
        ("['a, b', \"c #d\"]", ("a, b", "c #d")),
        ("[a b, c:d]", ("a b", "c:d")),
        ("null", None),
        (" null ", None),
    ],
)
def test_lists_of_text_hold_text(typed: str, expected: tuple[str, ...] | None, file: Path) -> None:
    file.write_text(FILE.replace("logs", "logs, sparse_features: [x]"))
    assert load_config(file, [f"data.sparse_features={typed}"]).data.sparse_features == expected


# A value of which a part would be lost, or that no list is -> what the message says.
REFUSED = {
    "data.sparse_features=[a #1, b]": r"not valid YAML in line 1: .*; a name with , : # \[ \] \{ \} or quotes in it",
    "data.sparse_features=[a, b] #c": r"'#c' is a comment in YAML, which is not read",
    "data.sparse_features=a": r"data\.sparse_features: expected a list, each text or null, found a; write \[a\]$",
    "run.trackers=mlflow": r"run\.trackers: expected a list, each one of .*, found mlflow; write \[mlflow\]$",
    "run.trackers=[mlflow, tensorbord]": r"run\.trackers: .* \[mlflow, tensorbord\] \(did you mean 'tensorboard'\?\)$",
    "data.sparse_features=~": r"data\.sparse_features: expected a list, each text or null, found '?~'?; write ",
    "data.dense_features={a: b}": r"data\.dense_features: expected a list, each text or null, found \{a: b\}$",
    "data.dense_features=[a, [b]]": r"data\.dense_features: expected a list, each text or null",
    "train.epochs=3 # all": r"'# all' is a comment in YAML, which is not read; leave it out, or put",
    "train.device=cpu #cuda": r"'#cuda' is a comment",
    "model.bottom_mlp=[8, #9,\n 4]": r"'#9,' is a comment",
    "sharding.tables={C1: {exchange: after}} # x": r"'# x' is a comment",
    "run.dir=a\0b": r"run\.dir is 'a.*b', and holds a NUL character",
    "run.dir=a\udcffb": r"run\.dir is 'a.*b', which is not UTF-8 text",
    "data.path=a\ud800": r"data\.path is .*, which is not UTF-8 text",
    'data.sparse_features=["a\\0"]': r"data\.sparse_features is .*, and holds a NUL character",
}


@pytest.mark.parametrize("override", REFUSED, ids=lambda override: ascii(override))
def test_no_part_of_a_value_is_dropped_without_a_word(override: str, file: Path) -> None:
    assert re.search(REFUSED[override], error_of(file, override))


def test_the_name_of_a_table_may_contain_dots(file: Path) -> None:
    config = load_config(file, ["sharding.tables.user.id.exchange=after", "sharding.tables.x.rows_dtype=fp16"])
    assert (config.sharding.tables["user.id"].exchange, config.sharding.tables["x"].rows_dtype) == ("after", "fp16")
    assert "sharding.tables.user.id.exchnge: unknown key" in error_of(file, "sharding.tables.user.id.exchnge=after")


def test_a_leading_tilde_is_the_home_directory_in_every_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for key in texts(load_config(file)):
        assert texts(load_config(file, [f"{key}=~/x #1"]))[key] == "/home/me/x #1"
