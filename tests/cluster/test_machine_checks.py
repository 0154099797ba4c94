import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from mlet_dist.cluster import machine_checks, software_checks
from mlet_dist.cluster.software_checks import Check, ImportProbe, format_checks

GIB = 1 << 30
CHECK_NAMES = ["python", "versions", "fbgemm build", "imports", "devices", "cores", "memory", "/dev/shm", "disk"]
REPORT = {"cuda_build": "", "devices": [], "nccl": False, "gloo": True, "kernel_error": ""}
GPU_REPORT = {"cuda_build": "13.0", "devices": ["H100", "H100"], "nccl": True, "gloo": True, "kernel_error": ""}

# The output of torch 2.13 when fbgemm-gpu-cpu 1.6 is imported: the first error is the root cause, not the last.
WRONG_PAIR = """\
ERROR:root:Could not load the library 'fbgemm_gpu_config.so'!
Traceback (most recent call last):
  File "torch/_ops.py", line 1516, in load_library
    ctypes.CDLL(path)
OSError: fbgemm_gpu/fbgemm_gpu_config.so: undefined symbol: _ZNR5torch7Library4_def

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "<string>", line 1, in <module>
OSError: Could not load this library: fbgemm_gpu/fbgemm_gpu_config.so
"""


def versions(
    torch: str | None, torchrec: str | None, *, cuda: str | None = None, cpu: str | None = None
) -> dict[str, str | None]:
    return {"torch": torch, "torchrec": torchrec, "fbgemm-gpu": cuda, "fbgemm-gpu-cpu": cpu}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "fail"), ((4, 11), "fail")]
)
def test_python(version: tuple[int, int], status: str) -> None:
    assert software_checks.check_python(version).status == status


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.13.0", (1, 8)),
        ("2.13.0+cu130", (1, 8)),
        ("2.11.1", (1, 6)),
        ("2.5.0", (1, 0)),
        ("2.4.1", None),
        ("1.13.0", None),
        ("3.6.0", None),
        ("unknown", None),
    ],
)
def test_compatible_version_torch(torch: str, expected: tuple[int, int] | None) -> None:
    assert software_checks.compatible_version(torch) == expected


@pytest.mark.parametrize(
    ("installed", "status", "found"),
    [
        (versions("2.13.0+cpu", "1.8.0", cpu="1.8.0"), "ok", "torch 2.13.0+cpu"),
        (versions("2.13.0", "1.8.0", cuda="1.8.0"), "ok", "fbgemm-gpu 1.8.0"),
        (versions("2.11.0", "1.6.0", cpu="1.6.0"), "warn", "tested with torch 2.13.0"),
        (versions("2.13.0", "1.8.0", cpu="1.6.0"), "fail", "needs fbgemm-gpu-cpu 1.8"),
        (versions("2.13.0", "1.7.0", cpu="1.8.0"), "fail", "needs torchrec 1.8"),
        (versions("2.14.1", "1.8.0", cuda="1.8.0"), "fail", "needs torchrec and fbgemm-gpu 1.9"),
        (versions("2.13.0", "1.8.0", cpu="1.8.0", cuda="1.7.0"), "fail", "needs fbgemm-gpu 1.8"),
        (versions("2.13.0", "1.18.0", cpu="1.8.0"), "fail", "needs torchrec 1.8"),
        (versions("1.13.1", "1.8.0", cpu="1.8.0"), "fail", "no fbgemm or torchrec is known"),
        (versions(None, "1.8.0", cpu="1.8.0"), "fail", "not installed: torch"),
        (versions("2.13.0", None), "fail", "not installed: torchrec, fbgemm-gpu or -cpu"),
    ],
)
def test_versions(installed: dict[str, str | None], status: str, found: str) -> None:
    check = software_checks.check_versions(installed, has_driver=False)
    assert check.status == status
    assert found in check.found
    assert check.advice == ("" if status == "ok" else software_checks.INSTALL_CPU)


def test_wrong_versions_are_fixed_with_the_cuda_builds_if_there_is_a_driver() -> None:
    check = software_checks.check_versions(versions("2.13.0", "1.7.0", cuda="1.8.0"), has_driver=True)
    assert check.advice == software_checks.INSTALL_CUDA


@pytest.mark.parametrize(
    ("cuda", "cpu", "has_driver", "status", "advice"),
    [
        ("1.8.0", None, True, "ok", ""),
        (None, "1.8.0", False, "ok", ""),
        ("1.8.0", None, False, "fail", software_checks.INSTALL_CPU),
        (None, "1.8.0", True, "warn", software_checks.INSTALL_CUDA),
        ("1.8.0", "1.8.0", False, "fail", software_checks.INSTALL_CPU),
        ("1.8.0", "1.8.0", True, "fail", software_checks.INSTALL_CUDA),
        (None, None, False, "fail", software_checks.INSTALL_CPU),
    ],
)
def test_fbgemm_build(cuda: str | None, cpu: str | None, has_driver: bool, status: str, advice: str) -> None:
    check = software_checks.check_fbgemm_build(versions("2.13.0", "1.8.0", cuda=cuda, cpu=cpu), has_driver)
    assert (check.status, check.advice) == (status, advice)


def test_advice_removes_both_builds_and_installs_one() -> None:
    for command, build, other in (
        (software_checks.INSTALL_CUDA, "fbgemm-gpu==", "fbgemm-gpu-cpu=="),
        (software_checks.INSTALL_CPU, "fbgemm-gpu-cpu==", "fbgemm-gpu=="),
    ):
        removal, installs = command.split(" && ", 1)
        assert removal.endswith("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu")
        assert build in installs
        assert other not in installs
        assert command.startswith(sys.executable)
    assert "--no-deps torchrec==" in software_checks.INSTALL_CPU


@pytest.mark.parametrize(
    ("stderr", "has_driver", "found", "advice"),
    [
        (WRONG_PAIR, False, "undefined symbol: _ZNR5torch7Library4_def", software_checks.INSTALL_CPU),
        (WRONG_PAIR, True, "undefined symbol: _ZNR5torch7Library4_def", software_checks.INSTALL_CUDA),
        (
            "OSError: libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
            False,
            "a CUDA build without an NVIDIA driver",
            software_checks.INSTALL_CPU,
        ),
        (
            "OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory",
            True,
            "fbgemm is a CUDA build, torch is not",
            "uninstall -y torch",
        ),
        ("ModuleNotFoundError: No module named 'torchrec.modules'", False, "torchrec", software_checks.INSTALL_CPU),
        ("ModuleNotFoundError: No module named 'pyre_extensions'", False, "pyre", "-m pip install pyre-extensions"),
        ("some.odd.CustomError: nobody knows", False, "nobody knows", "import torch, fbgemm_gpu, torchrec"),
        ("", False, "no error message", "import torch, fbgemm_gpu, torchrec"),
    ],
)
def test_failed_import_reports_its_root_cause_and_a_fix(stderr: str, has_driver: bool, found: str, advice: str) -> None:
    check = software_checks.check_imports(ImportProbe(1, stderr, {}), has_driver)
    assert check.status == "fail"
    assert found in check.found
    assert advice in check.advice


def test_import_that_crashes_or_hangs_the_interpreter() -> None:
    assert "SIGILL" in software_checks.check_imports(ImportProbe(-4, "", {}), False).found
    assert "not imported after" in software_checks.check_imports(ImportProbe(None, "", {}), False).found
    assert software_checks.check_imports(ImportProbe(0, "a warning", REPORT), False).status == "ok"


@pytest.mark.parametrize(
    ("report", "has_driver", "status", "found"),
    [
        (REPORT, False, "ok", "cpu + gloo"),
        (GPU_REPORT, True, "ok", "2 x H100, torch for CUDA 13.0; will run on cuda + nccl"),
        (GPU_REPORT | {"nccl": False}, True, "fail", "without nccl"),
        (REPORT | {"gloo": False}, False, "fail", "without gloo"),
        (REPORT | {"cuda_build": "13.0"}, True, "warn", "but an NVIDIA driver"),
        (GPU_REPORT | {"kernel_error": "Could not run"}, True, "fail", "fbgemm's kernels fail: Could not run"),
    ],
)
def test_devices(report: dict[str, object], has_driver: bool, status: str, found: str) -> None:
    check = software_checks.check_devices(report, has_driver)
    assert check.status == status
    assert found in check.found
    assert bool(check.advice) == (status != "ok")


def test_gpu_is_idle_because_torch_is_a_cpu_build_or_it_is_hidden() -> None:
    assert "uninstall -y torch" in software_checks.check_devices(REPORT, has_driver=True).advice
    assert (
        "CUDA_VISIBLE_DEVICES" in software_checks.check_devices(REPORT | {"cuda_build": "13.0"}, has_driver=True).advice
    )


@pytest.mark.parametrize(
    ("affinity", "quota", "found", "status"),
    [
        (8, None, "8 of", "ok"),
        (8, 2.5, "2.5 of", "ok"),
        (2, 4.0, "2 of", "ok"),
        (1, None, "1 of", "warn"),
        (8, 0.5, "0.5 of", "warn"),
    ],
)
def test_cores(affinity: int, quota: float | None, found: str, status: str) -> None:
    check = machine_checks.check_cores(affinity, 64, quota)
    assert check.found.startswith(found)
    assert check.status == status


def test_memory_shm_and_disk_warn_when_there_is_too_little() -> None:
    assert machine_checks.check_memory(8 * GIB, 4 * GIB).status == "ok"
    assert machine_checks.check_memory(8 * GIB, 4 * GIB - 1).status == "warn"
    assert machine_checks.check_disk("/here", 5 * GIB).status == "ok"
    assert machine_checks.check_disk("/here", 5 * GIB - 1) == Check(
        "disk",
        "warn",
        "5.0 GiB free in /here",
        "free some space (see `df -h .`), or set data.path and run.dir to a larger disk",
    )
    assert machine_checks.check_shm(GIB, GIB).status == "ok"
    small, full = machine_checks.check_shm(64 << 20, 64 << 20), machine_checks.check_shm(8 * GIB, 0)
    assert (small.status, full.status) == ("warn", "warn")
    assert "--shm-size" in small.advice
    assert "medium: Memory" in small.advice
    assert "--shm-size" not in full.advice


def test_this_environment() -> None:
    """Run all checks here; the results for devices, cores and memory depend on the machine."""
    code = """if True:
        import json, sys
        from mlet_dist.cluster.machine_checks import run_doctor
        print(json.dumps([run_doctor(), "torch" in sys.modules]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result, torch_imported = json.loads(done.stdout)
    assert not torch_imported
    checks = {check["name"]: check for check in result["checks"]}
    assert list(checks) == CHECK_NAMES
    for name in ("python", "versions", "imports"):
        assert checks[name]["status"] == "ok", checks[name]
    assert result["ok"] == all(check["status"] != "fail" for check in checks.values())


def test_import_that_takes_too_long_is_stopped() -> None:
    assert software_checks.try_imports(timeout=0.01) == ImportProbe(None, "", {})


def test_text_shows_every_check_and_its_advice() -> None:
    checks = [asdict(Check("memory", "ok", "20 GiB")), asdict(Check("imports", "fail", "undefined symbol", "a\nb"))]
    lines = format_checks({"ok": False, "checks": checks}).splitlines()
    assert lines[0].split() == ["ok", "memory", "20", "GiB"]
    assert lines[1].split() == ["fail", "imports", "undefined", "symbol"]
    assert [line.strip() for line in lines[2:4]] == ["a", "b"]
    assert "fail" in lines[4]
    assert format_checks({"ok": True, "checks": checks[:1]}).splitlines()[-1] == "all checks passed"
