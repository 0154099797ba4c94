"""Tests of `mlet prepare` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlet_dist import cli
from mlet_dist.data.schema import DatasetSchema
from tests.helpers.raw_logs import make_raw_lines, raw_bytes

Write = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main(["prepare", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_criteo_then_check(tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_raw(raw_bytes(make_raw_lines(100)) + b"bad\n")
    made = run(capsys, "criteo", raw, "--out", tmp_path / "out", "--memory", "1G", "--processes", 1)
    schema = DatasetSchema.load(tmp_path / "out")
    assert made == {
        "out": str(tmp_path / "out"),
        "rows": {"train": 80, "valid": 10, "test": 10},
        "positive_rate": schema.positive_rate,
        "malformed": 1,
        "tables": 26,
        "num_embeddings": sum(schema.num_embeddings.values()),
        "out_of_vocabulary": {
            split: {name: each.out_of_vocabulary / each.ids for name, each in of.items() if each.out_of_vocabulary}
            for split, of in schema.id_counts.items()
        },
    }
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["arguments"]["sparse"][0]["min_count"] == 2
    assert manifest["inputs"] == [
        {"path": str(raw), "bytes": raw.stat().st_size, "lines": 101, "rows": 100, "malformed": 1}
    ]
    assert run(capsys, "--check", tmp_path / "out")["ok"] is True
    (tmp_path / "out/train/part-00000.parquet").write_bytes(b"")
    assert cli.main(["prepare", "--check", str(tmp_path / "out")]) == 2
    assert "part-00000.parquet: has 0 bytes instead of" in capsys.readouterr().err


def test_pass_by_pass(tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]) -> None:
    days = [write_raw(raw_bytes(make_raw_lines(20, seed)), f"day_{seed}") for seed in range(3)]
    arguments = ("criteo", *days, "--split", "paper", "--out", tmp_path / "out")
    for name in ("read", "count", "vocabulary", "write"):
        for shard in (("--shard", "0/2"), ("--shard", "1/2")) if name != "vocabulary" else ((),):
            expected = {"out": str(tmp_path / "out"), "pass": name, "shard": shard[1] if shard else "0/1"}
            assert run(capsys, *arguments, "--pass", name, *shard) == expected
    assert run(capsys, *arguments, "--pass", "merge")["rows"] == {"train": 40, "valid": 10, "test": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the format is missing; it is criteo, avazu or table"),
        (["day.tsv"], "argument format: invalid choice: 'day.tsv'"),
        (["criteo"], "no raw file was given"),
        (["criteo", "day.tsv"], "--out is missing"),
        (["criteo", "day.tsv", "--out", "x"], "day.tsv: cannot be read: No such file or directory"),
        (["criteo", "s3x://bucket/day.tsv", "--out", "x"], "s3x://bucket/day.tsv: cannot be opened: Protocol"),
        (["criteo", "day.tsv", "--out", "x", "--schema", "y"], "--schema goes with `mlet prepare table`"),
        (["criteo", "day.tsv", "--out", "x", "--min-count", "0"], "min_count is 0; it must be at least 1"),
        (["criteo", "day.tsv", "--out", "x", "--seed", "1"], "--seed goes with --split random"),
        (["avazu", "day.csv", "--out", "x", "--seed", "-1"], "--seed -1 is negative"),
        (["criteo", "day.tsv", "--out", "x", "--split", "time"], "argument --split: invalid choice: 'time'"),
        (["criteo", "day.tsv", "--out", "x", "--max-malformed", "2"], "--max-malformed 2.0 is not a share from 0 to 1"),
        (
            ["criteo", "day.tsv", "--out", "x", "--memory", "lots"],
            "argument --memory: 'lots' is not a number of bytes",
        ),
        (["criteo", "day.tsv", "--out", "x", "--shard", "2/2"], "--shard '2/2' is not i/N with i from 0 to N-1"),
        (
            ["criteo", "day.tsv", "--out", "x", "--shard", "0/2"],
            "a shard goes with one of the passes read, count",
        ),
        (["criteo", "day.tsv", "--out", "x", "--pass", "sort"], "argument --pass: invalid choice: 'sort'"),
        (["table", "a.csv", "--out", "x"], "--schema is missing; `mlet prepare table` needs a YAML description"),
        (
            ["table", "a.csv", "--out", "x", "--schema", "y", "--min-count", "2"],
            "--min-count goes with criteo and",
        ),
        (["table", "a.csv", "--out", "x", "--schema", "nowhere.yaml"], "nowhere.yaml: cannot read the description"),
        (
            ["criteo", "a.tsv", "--out", "x", "--train", "b.tsv"],
            "a.tsv: is given beside --train, but files without",
        ),
        (
            ["criteo", "--out", "x", "--valid", "/dev/null"],
            "no raw file of the training split was given",
        ),
        (["criteo", "/dev/null", "--out", "x", "--test", "b", "--split", "rows"], "--split rows goes without --test"),
        (["criteo", "/dev/null", "--out", "x"], "/dev/null: is a device; raw data is read more than once"),
        (["criteo", "*.tsv", "--out", "x"], "*.tsv: no file matches the pattern"),
        (["criteo", ".", "--out", "x"], ".: is a directory without raw files"),
        (["criteo", "--check", "x"], "--check cannot be combined with a format or --out"),
        (["--check", "nowhere"], "nowhere: no such data set"),
    ],
)
def test_input_errors(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlet: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_split_already(tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]) -> None:
    days = [write_raw(raw_bytes(make_raw_lines(20 + seed, seed)), f"day_{seed}") for seed in range(4)]
    lists = ("--train", days[0], days[1], "--test", tmp_path / "raw/*_[3]", "--valid", days[2])
    assert run(capsys, "criteo", "--out", tmp_path / "a", *lists)["rows"] == {"train": 41, "valid": 22, "test": 23}
    two = run(capsys, "criteo", days[0], "--valid", days[2], "--out", tmp_path / "b")
    assert (two["rows"], two["positive_rate"].keys()) == ({"train": 20, "valid": 22}, {"train", "valid"})
    assert run(capsys, "--check", tmp_path / "b")["ok"] is True


def test_lists_and_the_split_of_a_description(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.csv").write_text("y,x\n" + 9 * "1,a\n0,b\n")
    for split, is_allowed in (("", True), ("split: {by: file}\n", True), ("split: {by: random}\n", False)):
        Path("t.yaml").write_text("format: csv\nlabel: {column: y}\nsparse: [{column: x}]\n" + split)
        arguments = ["prepare", "table", "a.csv", "--test", "b.csv", "--schema", "t.yaml", "--out", f"out{len(split)}"]
        assert cli.main(arguments) == (0 if is_allowed else 2)
    assert "--test names the files of a split, but t.yaml has a split of its own; use one" in capsys.readouterr().err


def test_remote_paths(tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """URLs that fsspec opens are read like files: here its store in memory, and a file by URL."""
    import fsspec

    text = raw_bytes(make_raw_lines(100))
    with fsspec.open("memory://logs/day.tsv", "wb") as file:
        file.write(text[: len(text) // 2])
    rest = write_raw(text[len(text) // 2 :], "rest.tsv.gz")
    cut = write_raw(text[: len(text) // 2], "cut.tsv")
    max_malformed = ("--max-malformed", 1)  # the line that is cut in two
    run(capsys, "criteo", "memory://logs/day.tsv", f"file://{rest}", "--out", tmp_path / "remote", *max_malformed)
    run(capsys, "criteo", cut, rest, "--out", tmp_path / "local", *max_malformed)
    schemas = [DatasetSchema.load(tmp_path / name) for name in ("remote", "local")]
    assert schemas[0] == schemas[1]
    assert schemas[0].malformed == 2


def time_split(write_raw: Write, label: Callable[[int], int]) -> tuple[Path, Path]:
    """Write 1,000 rows in the order of time, with users who come and go, and lists of tags; return it with its YAML."""
    lines = ["t,clicked,user,shop,tags"]
    for row in range(1000):
        tags = "|".join(f"g{tag}" for tag in range(row % 4)) if row < 850 else "new|g1"
        lines.append(f"{row},{int(label(row))},u{row // 10},s{row % 7},{tags}")
    raw = write_raw("\n".join(lines).encode(), "log.csv")
    table = raw.parent / "table.yaml"
    table.write_text(
        "format: csv\nlabel: {column: clicked}\nsplit: {by: time, column: t}\nsparse:\n"
        "- {column: user}\n- {column: shop, encoding: hash, num_embeddings: 5}\n- {column: tags, separator: '|'}\n"
    )
    return raw, table


def test_ids_that_training_never_saw_are_counted_and_said(
    tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, table = time_split(write_raw, lambda row: row % 3 == 0)
    arguments = ["prepare", "table", str(raw), "--schema", str(table), "--out"]
    assert cli.main([*arguments, str(tmp_path / "shown")]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["user", "0.00%", "100.00%", "100.00%", "0", "0", "0"] in lines
    assert ["tags", "0.00%", "28.90%", "50.00%", "200", "13", "0"] in lines
    assert ["shop", "0", "0", "0"] not in lines  # a hashed feature of one value a row has neither
    for split, tags in (("valid", "29%"), ("test", "50%")):
        expected = f"more than 20% of the ids of {split} are out of vocabulary (id 0): user 100%, tags {tags}; "
        assert expected in shown.err
    assert "no training row has id 0 of user, tags, so its vector is zero" in shown.err

    found = run(capsys, *arguments[1:], tmp_path / "counted")["out_of_vocabulary"]
    assert found == {"train": {}, "valid": {"user": 1.0, "tags": 50 / 173}, "test": {"user": 1.0, "tags": 0.5}}
    schema = DatasetSchema.load(tmp_path / "counted")
    assert schema.untrained_first_rows == ("user", "tags")
    assert "shop" not in schema.id_counts["test"]


@pytest.mark.parametrize("label", [0, 1])
def test_a_training_split_of_one_class_is_an_error(
    tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str], label: int
) -> None:
    raw, table = time_split(write_raw, lambda row: label if row < 800 else row % 2)
    assert cli.main(["prepare", "table", str(raw), "--schema", str(table), "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith(f"mlet: error: {raw}: all 800 rows of train have label {label}, so a model can learn")
    assert not (tmp_path / "out").exists()


def test_other_splits_of_one_class_are_warnings(
    tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, table = time_split(write_raw, lambda row: row % 2 if row < 800 else row >= 900)
    assert cli.main(["prepare", "table", str(raw), "--schema", str(table), "--out", str(tmp_path / "out")]) == 0
    errors = capsys.readouterr().err
    assert f"mlet: warning: {tmp_path / 'out'}: all 100 rows of valid have label 0, so its AUC is undefined" in errors
    assert f"mlet: warning: {tmp_path / 'out'}: all 100 rows of test have label 1, so its AUC is undefined" in errors
