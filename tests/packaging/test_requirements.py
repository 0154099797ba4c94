"""Requirements of pyproject.toml, their pins, and those who repeat them."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from mlet_dist.cluster import software_checks

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(requirements: list[str]) -> dict[str, str]:
    """Name to exact version, or to "" for a requirement that is not pinned."""
    found = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        assert name, requirement
        pin = re.search(r"==([\w.]+)$", requirement)
        found[normalized(name[0])] = pin[1] if pin else ""
    return found


CORE, CUDA, CPU = pins(PROJECT["dependencies"]), pins(EXTRAS["cuda"]), pins(EXTRAS["cpu"])
CONSTRAINT_LINES = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
]
CONSTRAINTS = pins(CONSTRAINT_LINES)


def test_core_leaves_the_choice_of_fbgemm_build_to_the_extras() -> None:
    assert not {"fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec"} & set(CORE)


def test_each_extra_names_exactly_its_own_fbgemm_build() -> None:
    assert "fbgemm-gpu" in CUDA
    assert "fbgemm-gpu-cpu" not in CUDA
    assert "fbgemm-gpu-cpu" in CPU
    # torchrec would drag the CUDA build in.
    assert not {"fbgemm-gpu", "torchrec"} & set(CPU)


@pytest.mark.parametrize("extra", [CUDA, {**CPU, "torchrec": software_checks.TORCHREC}], ids=["cuda", "cpu"])
def test_pinned_versions_fit_together(extra: dict[str, str]) -> None:
    versions = {name: (CORE | extra).get(name) for name in software_checks.PACKAGES}
    assert software_checks.check_versions(versions, has_driver=False).status == "ok"


def test_doctor_tells_people_to_install_the_pinned_versions() -> None:
    assert software_checks.TORCH == CORE["torch"]
    assert software_checks.FBGEMM == CUDA["fbgemm-gpu"] == CPU["fbgemm-gpu-cpu"]
    assert software_checks.TORCHREC == CUDA["torchrec"]
    for name, version in CPU.items():
        assert f"{name}=={version}" * bool(version) in software_checks.INSTALL_CPU
        assert name in software_checks.INSTALL_CPU


def test_doctor_accepts_the_pythons_the_package_accepts() -> None:
    low, high = software_checks.PYTHONS[0], software_checks.PYTHONS[-1]
    assert PROJECT["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


def test_makefile_installs_torch_pinned_and_first_and_torchrec_for_cpus_alone() -> None:
    installs = re.findall(r"\$\(PIP_INSTALL\) ([^&;\n]+)", (ROOT / "Makefile").read_text())
    assert [line.strip() for line in installs] == [
        f"torch=={CORE['torch']}",
        "-e '.[cuda,launch,dev,docs,bench]'",
        "-e '.[cpu,launch,dev,docs,bench]'",
        f"--no-deps torchrec=={CUDA['torchrec']}",
    ]


def test_constraints_are_exact_and_free_of_build_suffixes() -> None:
    for line in CONSTRAINT_LINES:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    assert CONSTRAINT_LINES == sorted(CONSTRAINT_LINES)


def test_constraints_cover_every_requirement_and_agree_with_its_pin() -> None:
    requirements = CORE | CUDA | {name: pin for extra in EXTRAS.values() for name, pin in pins(extra).items()}
    for name, pin in requirements.items():
        assert name in CONSTRAINTS
        assert pin in ("", CONSTRAINTS[name])


def test_constraints_cover_what_is_installed_for_mlet_dist() -> None:
    """Every package that the requirements lead to, however far, so that two set-ups of one commit are alike."""
    todo = list(
        CORE | {name: "" for extra in ("cpu", "launch", "dev", "docs", "bench") for name in pins(EXTRAS[extra])}
    )
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            try:
                needed = requires(name) or []
            except PackageNotFoundError:
                # Not for this Python or platform, or an optional part of the set that is not here.
                continue
            todo += pins([line.split(";")[0].split("[")[0].strip() for line in needed if ";" not in line])
    # A CUDA build of torch pins its own NVIDIA packages.
    missing = {name for name in seen - set(CONSTRAINTS) if not re.match(r"nvidia-|cuda-|triton", name)}
    assert missing == set()
