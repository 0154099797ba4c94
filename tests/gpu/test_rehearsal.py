"""The checks for GPUs, rehearsed on the CPU: what can run here passes, the rest says why not, and a failure shows."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.gpu.machine import Machine, NotHere
from tests.gpu.run_checks import CHECKS, main

pytestmark = pytest.mark.multirank

REHEARSED = (
    "collectives",
    "every_precision",
    "pipelined_is_plain",
    "resumed_is_uninterrupted",
    "rounded_exchange",
    "steps_without_host_copies",
)
CUDA_ONLY = ("host_memory_kernels", "stochastic_rounding", "fused_adam_is_lazy_adam", "step_benchmark")


def _checks(path: Path) -> dict[str, dict[str, object]]:
    return {each["name"]: each for each in json.loads(Path(f"{path}.json").read_text())["checks"]}


def test_the_rehearsal_passes_and_names_what_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "results" / "rehearsal"
    assert main(["--device", "cpu", "--ranks", "1", "2", "--out", str(out), "--only", *REHEARSED, *CUDA_ONLY]) == 0
    found = _checks(out)
    assert list(found) == [*REHEARSED, *CUDA_ONLY]
    for name in REHEARSED:
        assert found[name]["result"] == "passed", found[name]
    for name in CUDA_ONLY:
        assert found[name]["result"] == "skipped"
        assert str(found[name]["text"]).startswith("needs a GPU: ")
    page = Path(f"{out}.md").read_text()
    assert "6 passed, 0 failed, 4 skipped" in page
    assert all(f"| `{name}`" in page for name in found)


def test_a_failure_is_in_the_result_and_the_others_still_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(_: Machine) -> str:
        """Something that fails."""
        raise AssertionError("weights differ by 3\nand more")

    def absent(_: Machine) -> str:
        raise NotHere("there is one GPU")

    def right(_: Machine) -> str:
        return "found nothing | wrong"

    checks = {"wrong": wrong, "absent": absent, "right": right}
    assert main(["--device", "cpu", "--out", str(tmp_path / "r")], checks) == 1
    assert [each["result"] for each in _checks(tmp_path / "r").values()] == ["failed", "skipped", "passed"]
    page = (tmp_path / "r.md").read_text()
    assert re.search(r"\| failed \| [\d.]+ \| weights differ by 3 \|", page)
    assert "## wrong" in page
    assert "in wrong" in page  # the traceback
    assert "found nothing \\| wrong" in page
    assert "3 checks, 1 failed: wrong" in capsys.readouterr().out


def test_checks_that_do_not_fit_in_the_time_are_named(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--time-limit", "0", "--out", str(tmp_path / "r")]) == 0
    found = _checks(tmp_path / "r")
    assert list(found) == list(CHECKS)
    assert {each["text"] for each in found.values()} == {"no time was left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "finds 0 GPUs here; rehearse on the CPU by --device cpu" in capsys.readouterr().err


def test_every_check_says_what_it_checks() -> None:
    assert all((check.__doc__ or "").strip().endswith(".") for check in CHECKS.values())
