"""The Dockerfile passes a linter and provides what the manifests expect."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from mlet_dist import __version__
from tests.helpers.mlet_command import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


def test_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint is not installed; `make setup` installs it"
    done = subprocess.run([hadolint, "--format", "json", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_targets_and_versions_match_the_manifests_and_extras() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    assert {"cpu", "cuda"} <= set(stages)
    tags = set(re.findall(r"docker build --target (\w+) +-t (\S+)", TEXT))
    assert tags == {("cuda", f"mlet-dist:{__version__}"), ("cpu", f"mlet-dist-cpu:{__version__}")}
    for name in ("job", "jobset", "trainjob", "cpu", "cpu/data"):
        for image in yaml.safe_load((ROOT / "k8s" / name / "kustomization.yaml").read_text())["images"]:
            assert image["newName"].removeprefix("mlet-dist") in ("", "-cpu")
            assert image["newTag"] == __version__
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"--no-deps {extras['cuda'][0]}" in TEXT
    assert re.findall(r"torch==([\d.]+)", TEXT) == ["2.13.0", "2.13.0"]


def test_images_do_not_run_as_root_and_copied_files_exist() -> None:
    assert re.findall(r"^USER (\S+)$", TEXT, flags=re.MULTILINE) == ["1000:1000", "1000:1000"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", TEXT, flags=re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored
