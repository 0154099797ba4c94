"""The project's own files agree: version, licence, make targets, CI, hooks, and the documented installation."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from mlet_dist import __version__

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
CI = (ROOT / ".ci" / "run").read_text()
GUIDES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def project_files() -> list[Path]:
    """What git tracks or would track; in a copy without git, everything outside hidden folders but CI's."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in paths if path.is_file()]


def make_targets() -> set[str]:
    """The names that follow .PHONY in the Makefile."""
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)
    assert phony
    return set(phony[1].split())


def documents() -> dict[str, str]:
    """The text of every Markdown page that a user may read, by its path."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in project_files()
        if path.suffix == ".md" and path.relative_to(ROOT).parts[0] != "tests"
    }


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    return loaded


def commands_of(name: str) -> list[str]:
    """What a workflow runs, in order."""
    return [step["run"] for job in workflow(name)["jobs"].values() for step in job["steps"] if "run" in step]


def test_no_file_says_where_packages_come_from() -> None:
    forbidden = re.compile("|".join(["index" + "-url", "find" + "-links", "download.py" + "torch", "file:" + "///"]))
    named = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        if (match := forbidden.search(path.read_text(errors="replace")))
    ]
    assert named == []


def test_console_script_and_packages_point_into_mlet_dist() -> None:
    assert PROJECT["scripts"] == {"mlet": "mlet_dist.__main__:main"}
    assert importlib.util.find_spec("mlet_dist.__main__") is not None


def test_ci_runs_what_make_check_runs_with_the_tests_last() -> None:
    steps = re.search(r"^check: ([\w ]+?) ##", MAKEFILE, flags=re.MULTILINE)
    loop = re.search(r"for step in ([\w ]+); do", CI)
    assert steps
    assert loop
    assert [*loop[1].split(), "test"] == steps[1].split()
    order = ["make --no-print-directory wheel", "\n.ci/wheel", "for step", "\nwait", "make --no-print-directory test"]
    assert sorted(order, key=CI.index) == order


def test_makefile_offers_every_target_in_its_help() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+)", shown, flags=re.MULTILINE)) == make_targets()
    newcomers = shown.split("\n\n")[0]
    assert re.findall(r"^  make (\w+)", newcomers, flags=re.MULTILINE) == ["demo", "test"]


def test_workflows_run_what_ci_runs() -> None:
    """The workflows together run the make targets of .ci/run and its install script, and nothing else."""
    loop = re.search(r"for step in ([\w ]+); do", CI)
    assert loop
    names = [path.stem for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert sorted(names) == ["ci", "docs", "wheel"]
    found = {command for name in names for command in commands_of(name)}
    expected = {f"make {step}" for step in ("setup", "wheel", *loop[1].split(), "test")} | {".ci/wheel"}
    assert found == expected
    for name in names:
        assert commands_of(name)[0] == "make setup"
        assert workflow(name)["permissions"] == {"contents": "read"}
    assert commands_of("wheel") == ["make setup", "make wheel", ".ci/wheel"]


def test_hooks_are_local_and_run_make_targets() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert set(hooks) == {"lint", "types", "imports"}
    for name, hook in hooks.items():
        assert hook["entry"] == f"make --no-print-directory {name}"
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_the_version_is_written_once_and_repeated_rightly() -> None:
    """The images' names, the changelog and the citation follow ``mlet_dist.__version__``; pyproject.toml reads it."""
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mlet_dist.__version__"}
    images: dict[str, set[str]] = {}
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("Dockerfile", "k8s/", "docs/", "README")) and path.suffix in ("", ".md", ".yaml", ".py"):
            text = path.read_text(encoding="utf-8")
            if tags := re.findall(r"mlet-dist(?:-cpu)?:(\d[\w.]*\w)|newTag: (\S+)", text):
                images[name] = {"".join(tag) for tag in tags}
    assert {"Dockerfile", "k8s/job/kustomization.yaml", "k8s/cpu/kustomization.yaml"} <= set(images)
    assert {name: tags for name, tags in images.items() if tags != {__version__}} == {}
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (__version__, PROJECT["license"])


def test_reading_the_version_imports_nothing_heavy() -> None:
    script = (
        "import sys, mlet_dist; print(mlet_dist.__version__, sorted({'torch', 'torchrec', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__} []\n"


def test_metadata_is_complete_and_invents_nothing() -> None:
    assert PROJECT["license"] == "BSD-3-Clause"
    assert PROJECT["license-files"] == ["LICENSE"]
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("BSD 3-Clause License\n\nCopyright (c) 2026, the mlet_dist authors\n")
    assert PROJECT["authors"] == [{"name": "the mlet_dist authors"}]
    assert {"description", "keywords", "classifiers", "readme"} <= set(PROJECT)
    # A License classifier beside a licence expression is an error of the metadata's standard.
    assert not [line for line in PROJECT["classifiers"] if line.startswith("License ::")]
    assert "urls" not in PROJECT
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["mlet_dist"]
    assert (ROOT / "mlet_dist" / "py.typed").read_bytes() == b""
    for name in GUIDES:
        assert re.findall(r"\S+@\S+\.\w+", (ROOT / name).read_text()) == [], name


@pytest.mark.parametrize("name", GUIDES)
def test_guides_name_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(
        r"`((?:mlet_dist|launch|k8s|configs|tests|docs|benchmarks|\.ci|\.github)/[^`*<>\s]*)`", text
    ):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in make_targets(), target


def install_lines() -> dict[str, list[str]]:
    """Where the documentation says to install mlet_dist: by page, the lines."""
    found = {}
    for name, text in documents().items():
        lines = [line.strip() for line in text.splitlines()]
        installs = [line for line in lines if re.search(r"pip install .*(\[(cpu|cuda|launch)|mlet[-_]dist)", line)]
        if installs:
            found[name] = installs
    return found


def test_documented_installations_are_those_that_work() -> None:
    """They use the pinned versions and no index, which does not have the package; the CPU line is that of CI."""
    script = (ROOT / ".ci" / "wheel").read_text()
    tested = re.search(r"^(pip install .*) && (pip install --no-deps .*)$", script, flags=re.MULTILINE)
    assert tested
    torch = next(each for each in PROJECT["dependencies"] if each.startswith("torch=="))
    torchrec = next(each for each in PROJECT["optional-dependencies"]["cuda"] if each.startswith("torchrec=="))
    assert tested[1] == f'pip install {torch} "${{wheel}}[cpu,launch]"'
    assert tested[2] == f"pip install --no-deps {torchrec}"
    found = install_lines()
    for name, lines in found.items():
        for line in lines:
            assert "mlet-dist[" not in line, f"{name}: {line}"
            for version in re.findall(r"torch(?:rec)?==[\d.]+", line):
                assert version in (torch, torchrec), f"{name}: {line}"
    page = (ROOT / "docs" / "installation.md").read_text()
    wheel = f"mlet_dist-{__version__}-py3-none-any.whl"
    assert tested[0].replace("${wheel}", wheel) in found["docs/installation.md"]
    config = re.search(r"<<'YAML'\n(.*?)YAML\n", script, flags=re.DOTALL)
    assert config
    assert f"```yaml\n{config[1]}```" in page


def test_the_extras_together_with_torchrec_hold_what_it_needs() -> None:
    """By the installed metadata, [cuda] leaves out nothing that torchrec needs, and [cpu] fbgemm-gpu alone."""
    found = [Requirement(line) for line in requires("mlet-dist") or []]
    core = {each.name: each for each in found if each.marker is None}
    extra = {
        name: {each.name: each for each in found if each.marker and each.marker.evaluate({"extra": name})}
        for name in ("cpu", "cuda")
    }
    assert {name: str(each.specifier) for name, each in extra["cuda"].items()} == {
        "torchrec": "==1.8.0",
        "fbgemm-gpu": "==1.8.0",
    }
    needed = {each.name: each for line in requires("torchrec") or [] if not (each := Requirement(line)).marker}
    assert set(needed) - set(core) - set(extra["cpu"]) == {"fbgemm-gpu"}
    for name in needed.keys() & extra["cpu"].keys():
        assert extra["cpu"][name].specifier == needed[name].specifier, name
