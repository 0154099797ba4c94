"""MLET_LOG_FORMAT=json: every line of stderr is one JSON object."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.json_log import JsonLog, log_as_asked
from mlet_dist.node_log import log_of_node
from tests.helpers.forked_command import MLET
from tests.helpers.mlet_command import ROOT, run_command

JSON = os.environ | {"MLET_LOG_FORMAT": "json"}


def objects(text: str) -> list[dict[str, Any]]:
    """Parse each line, and check and remove its time."""
    found = [json.loads(line) for line in text.splitlines()]
    for each in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each.pop("time"))
    return found


def test_lines_become_objects_when_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    stream = io.StringIO()
    log = JsonLog(stream)
    print("mlet: error: a\tb", "ö", file=log)
    print("train 5/9 ", end="", file=log)
    assert objects(stream.getvalue()) == [{"level": "error", "message": "a\tb ö"}]
    monkeypatch.setenv("RANK", "3")
    log.write("steps\n\nmlet: warning: c\nmlet: d")
    log.close()
    assert objects(stream.getvalue())[1:] == [
        {"level": "info", "message": "train 5/9 steps", "rank": 3},
        {"level": "warning", "message": "c", "rank": 3},
        {"level": "info", "message": "d", "rank": 3},
    ]


def test_lines_of_nodes_have_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MLET_LOG_FORMAT", "json")
    before, stream = sys.stderr, io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with log_as_asked():
        log_of_node(1, 4, "all 4 nodes have joined")
    assert sys.stderr is stream is not before
    (found,) = objects(stream.getvalue())
    assert found == {"level": "info", "node": 1, "nodes": 4, "message": "all 4 nodes have joined"}


@pytest.mark.e2e
def test_a_job_logs_json_alone(tmp_path: Path) -> None:
    """Launcher and ranks, progress and the node's lines."""
    data = tmp_path / "data"
    run_command([*MLET, "synth", "--out", data, "--rows", 2000])
    command = [*MLET, "train", ROOT / "configs" / "demo.yaml", f"data.path={data}", f"run.dir={tmp_path / 'run'}"]
    command += ["--nproc", 1, "--nnodes", 1, "--node-rank", 0, "--master-addr", "localhost", "--json"]
    done = run_command(command, environment=JSON)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] > 0
    found = objects(done.stderr)
    assert any(each["message"].startswith("train ") and each["rank"] == 0 for each in found)
    wrong = run_command([*command, "data.batch_size=oops"], 2, JSON)
    (error,) = objects(wrong.stderr)
    assert error["level"] == "error"
    assert "data.batch_size" in error["message"]


@pytest.mark.e2e
def test_another_format_is_an_input_error() -> None:
    done = run_command([*MLET, "synth", "--help"], 2, os.environ | {"MLET_LOG_FORMAT": "jsn"})
    assert done.stderr == "mlet: error: MLET_LOG_FORMAT is 'jsn'; it must be text or json\n"
