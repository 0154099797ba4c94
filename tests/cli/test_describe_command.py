"""Tests of `mlet describe` as users run it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mlet_dist import cli
from tests.cli.test_cli import watch_imports
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    rng = random.Random(4)
    rows = [
        f"u{rng.randrange(20)},{rng.choice(['Zürich', 'Rome'])},{rng.random():.3f},{i % 3 // 2}" for i in range(300)
    ]
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(["user,city,price,click", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.e2e
def test_the_description_prepares_the_file(clicks: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    # In a shell, and with a locale that is not UTF-8.
    command = f"{sys.executable} -m mlet_dist describe {clicks} > {table}"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Zürich" in table.read_text(encoding="utf-8")
    found = mlet_json("prepare", "table", clicks, "--schema", table, "--out", tmp_path / "data")
    assert found["rows"] == {"train": 240, "valid": 30, "test": 30}
    assert (found["malformed"], found["tables"]) == (0, 2)


def test_json(clicks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", str(clicks)]) == 0
    text = capsys.readouterr().out
    assert cli.main(["describe", str(clicks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "raw": str(clicks), "rows": 300, "label": "click", "dense": 1, "sparse": 2, "description": text
    }  # fmt: skip


def test_without_a_label(clicks: Path, tmp_path: Path) -> None:
    raw = tmp_path / "users.csv"
    raw.write_text(
        clicks.read_text(encoding="utf-8").replace(",0\n", ",Bern\n").replace(",1\n", ",Bonn\n"), encoding="utf-8"
    )
    raw.write_text(raw.read_text(encoding="utf-8").replace("click", "home"), encoding="utf-8")
    done = mlet("describe", raw)
    assert done.stderr == "mlet: no column of labels was found; set `label` in the description\n"
    table = tmp_path / "table.yaml"
    table.write_text(done.stdout, encoding="utf-8")
    line = error_line("prepare", "table", raw, "--schema", table, "--out", tmp_path / "data")
    assert line == f"mlet: error: {table}: key 'label' is missing"
    assert not (tmp_path / "data").exists()


def test_errors_are_one_line_and_torch_is_not_imported(clicks: Path, tmp_path: Path) -> None:
    out, err = watch_imports("describe", clicks)
    assert out[-1] == "0 False"
    assert err == []
    out, (line,) = watch_imports("describe", tmp_path / "nowhere.csv")
    assert out == ["2 False"]
    assert line == f"mlet: error: {tmp_path}/nowhere.csv: cannot be read: No such file or directory"
    out, (line,) = watch_imports("describe")
    assert line == "mlet: error: the following arguments are required: RAW (see `mlet describe --help`)"
