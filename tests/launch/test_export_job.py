"""The Jobs that export a finished run without GPUs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ForkedCommand
from tests.helpers.kubernetes_schemas import Object, templates
from tests.helpers.mlet_command import ROOT
from tests.helpers.rendered_manifests import TRAINING, command, needs_kubectl, render, training_command

pytestmark = [needs_kubectl, pytest.mark.e2e]


def exporter(name: str) -> tuple[Object, Object]:
    """Return the object that exports, and the container of its pod."""
    found = [
        (thing, template["spec"]["containers"][0])
        for thing in render(name)
        for _, template in templates(thing)
        if template["metadata"]["labels"]["app.kubernetes.io/name"] == "mlet-export"
    ]
    (one,) = found
    return one


@pytest.mark.parametrize("name", TRAINING)
def test_no_gpu_waits_for_an_export(name: str) -> None:
    assert training_command(name).export is None
    thing, container = exporter(name)
    assert container["image"].startswith("mlet-dist-cpu:")
    assert not any("nvidia.com" in resource for resource in container["resources"]["limits"])
    parsed = command(container, thing)
    assert (parsed.export, parsed.once) == ("/storage/exports/mlet-train", True)
    assert parsed.overrides == training_command(name).overrides, "a run of other settings is not exported"
    if thing["kind"] == "Job":
        assert thing["spec"]["suspend"] is True


def arguments(trained: TrainedRun, run: Path, out: Path) -> list[object]:
    """Return the arguments of the Job, with files of the test."""
    words = exporter("job")[1]["args"]
    replaced = {"/config/config.yaml": ROOT / "configs" / "criteo_kaggle.yaml"}
    replaced |= {"--export=/storage/exports/mlet-train": f"--export={out}", "--wait=10": "--wait=2"}
    assert replaced.keys() <= set(words)
    return [*(replaced.get(word, word) for word in words), *trained.overrides, f"run.dir={run}"]


def run(*words: object) -> tuple[int, Any, str]:
    with ForkedCommand([*MLET, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def test_a_finished_run_is_exported_once(trained: TrainedRun, tmp_path: Path) -> None:
    for _ in range(2):
        code, output, errors = run(*arguments(trained, trained.path, tmp_path / "out"))
        assert code == 0, errors
        assert json.loads(output.splitlines()[-1])["export"]["ok"]
    assert errors.count("mlet export") == 0
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_run_that_has_not_finished_is_not_trained(trained: TrainedRun, tmp_path: Path) -> None:
    code, _, errors = run(*arguments(trained, tmp_path / "run", tmp_path / "out"))
    assert code == 69
    assert "node 1 of 2 did not join" in errors
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "out").exists()
