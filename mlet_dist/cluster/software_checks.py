"""Check that Python, torch, fbgemm and TorchRec are installed and compatible; each failed check comes with its fix."""

import ctypes
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

TORCH, FBGEMM, TORCHREC = "2.13.0", "1.8.0", "1.8.0"
PYTHONS = ((3, 11), (3, 12))
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")

PIP = f"{shlex.quote(sys.executable)} -m pip"
_REMOVE = f"{PIP} uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
INSTALL_CUDA = f"{_REMOVE} && {PIP} install torch=={TORCH} fbgemm-gpu=={FBGEMM} torchrec=={TORCHREC}"
INSTALL_ALL_CUDA = f"{PIP} uninstall -y torch; then, with an index that has CUDA builds of torch: {INSTALL_CUDA}"
INSTALL_CPU = (
    f"{_REMOVE} && {PIP} install torch=={TORCH} fbgemm-gpu-cpu=={FBGEMM} torchmetrics==1.0.3 tensordict pyre-extensions"
    f" && {PIP} install --no-deps torchrec=={TORCHREC}"
)

IMPORT_TIMEOUT = 120.0

_PROBE_SCRIPT = """
import json, torch, fbgemm_gpu, torchrec
from torch import distributed
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
try:
    lengths = torch.ones(2, dtype=torch.int64, device="cuda" if devices else "cpu")
    torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist()
    kernel_error = ""
except Exception as error:
    kernel_error = str(error).splitlines()[0]
print(json.dumps({
    "cuda_build": torch.version.cuda or "",
    "devices": devices,
    "nccl": distributed.is_available() and distributed.is_nccl_available(),
    "gloo": distributed.is_available() and distributed.is_gloo_available(),
    "kernel_error": kernel_error,
}))
"""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked, for example ``memory``.
        status: ``ok``; ``warn`` if mlet_dist works, but worse than it could; ``fail`` if mlet_dist cannot run.
        found: what was found, in one line.
        advice: what to type or change; empty if the status is ``ok``.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def format_checks(result: Mapping[str, Any]) -> str:
    """Format the result of ``run_doctor`` or ``check_ranks`` as text: one line for each check, then its advice."""
    width = max(len(check["name"]) for check in result["checks"])
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:4}  {check['name']:{width}}  {check['found']}")
        if check["advice"]:
            lines += [f"{'':{width + 8}}{line}" for line in check["advice"].splitlines()]
    lines.append("all checks passed" if result["ok"] else "some checks failed: see the lines that begin with fail")
    return "\n".join(lines)


def check_python(version: tuple[int, int]) -> Check:
    """Check that mlet_dist supports this version of Python."""
    found = ".".join(map(str, version))
    if version in PYTHONS:
        return Check("python", "ok", found)
    return Check("python", "fail", found, "create a virtual environment with Python 3.11 or 3.12 and install into it")


def check_versions(versions: Mapping[str, str | None], has_driver: bool) -> Check:
    """Check that fbgemm and torchrec are 1.(X-5) for torch 2.X; other combinations are incompatible."""
    fix = INSTALL_CUDA if has_driver else INSTALL_CPU
    fbgemms = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if versions[name]]
    missing = [name for name in ("torch", "torchrec") if not versions[name]] + ["fbgemm-gpu or -cpu"] * (not fbgemms)
    if missing:
        return Check("versions", "fail", f"not installed: {', '.join(missing)}", fix)
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    expected = compatible_version(versions["torch"] or "")
    if expected is None:
        return Check("versions", "fail", f"{found}: no fbgemm or torchrec is known to work with this torch", fix)
    incompatible = [name for name in ("torchrec", *fbgemms) if _minor(versions[name] or "") != expected]
    if incompatible:
        wanted = f"{expected[0]}.{expected[1]}"
        return Check("versions", "fail", f"{found}: this torch needs {' and '.join(incompatible)} {wanted}", fix)
    if _minor(versions["torch"] or "") != _minor(TORCH):
        return Check("versions", "warn", f"{found}: compatible, but mlet_dist is tested with torch {TORCH}", fix)
    return Check("versions", "ok", found)


def compatible_version(torch_version: str) -> tuple[int, int] | None:
    """Return the (major, minor) of fbgemm and torchrec that work with this torch; None if there is none."""
    minor = _minor(torch_version)
    return (1, minor[1] - 5) if minor is not None and minor[0] == 2 and minor[1] >= 5 else None


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def check_fbgemm_build(versions: Mapping[str, str | None], has_driver: bool) -> Check:
    """Check that one fbgemm build is installed, the one for this machine: both write the same ``fbgemm_gpu`` folder."""
    cuda, cpu = bool(versions["fbgemm-gpu"]), bool(versions["fbgemm-gpu-cpu"])
    driver = "an NVIDIA driver" if has_driver else "no NVIDIA driver"
    fix = INSTALL_CUDA if has_driver else INSTALL_CPU
    if cuda and cpu:
        return Check("fbgemm build", "fail", "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files", fix)
    if not cuda and not cpu:
        return Check("fbgemm build", "fail", "neither fbgemm-gpu nor fbgemm-gpu-cpu is installed", fix)
    found = f"{'fbgemm-gpu (CUDA)' if cuda else 'fbgemm-gpu-cpu'}, {driver}"
    if cuda and not has_driver:
        return Check("fbgemm build", "fail", f"{found}: the CUDA build cannot be imported", INSTALL_CPU)
    if cpu and has_driver:
        return Check("fbgemm build", "warn", f"{found}: embeddings cannot use the GPU", INSTALL_CUDA)
    return Check("fbgemm build", "ok", found)


@dataclass(frozen=True)
class ImportProbe:
    """The result of importing torch, fbgemm_gpu and torchrec in a subprocess.

    Attributes:
        returncode: its exit status, negative for a signal; None if it ran out of time.
        stderr: all that it wrote to stderr.
        report: the devices, backends and kernels that it found; empty if it failed.
    """

    returncode: int | None
    stderr: str
    report: dict[str, Any]


def check_imports(probe: ImportProbe, has_driver: bool) -> Check:
    """Check that torch, fbgemm_gpu and torchrec can be imported together; if not, find the root cause."""
    fix = INSTALL_CUDA if has_driver else INSTALL_CPU
    if probe.report:
        return Check("imports", "ok", "torch, fbgemm_gpu and torchrec can be imported together")
    retry = f"{shlex.quote(sys.executable)} -X faulthandler -c 'import torch, fbgemm_gpu, torchrec'"
    if probe.returncode is None:
        return Check("imports", "fail", f"not imported after {IMPORT_TIMEOUT:.0f} s", f"see where it hangs: {retry}")
    if probe.returncode < 0:
        name = signal.Signals(-probe.returncode).name
        return Check("imports", "fail", f"{name} killed the interpreter during the import", f"see where: {retry}")
    found = root_cause(probe.stderr)
    module = re.search(r"No module named '([\w.]+)'", found)
    if module and module[1].partition(".")[0] not in ("torch", "torchrec", "fbgemm_gpu"):
        return Check("imports", "fail", found, f"{PIP} install {module[1].partition('.')[0].replace('_', '-')}")
    if re.search(r"libnvidia-ml|libcuda\.so", found) and not has_driver:
        return Check("imports", "fail", f"{found} (a CUDA build without an NVIDIA driver)", INSTALL_CPU)
    if re.search(r"lib(torch|c10)_cuda", found):
        found = f"{found} (fbgemm is a CUDA build, torch is not)"
        return Check("imports", "fail", found, INSTALL_ALL_CUDA if has_driver else INSTALL_CPU)
    if module or re.search(r"undefined symbol|\.so\b", found):
        return Check("imports", "fail", f"{found} (incompatible builds)", fix)
    return Check("imports", "fail", found, f"see the full output: {retry}")


def root_cause(stderr: str) -> str:
    """Return the first error of a chain of tracebacks, since Python prints a cause before its consequence."""
    errors = re.findall(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): .+", stderr, flags=re.MULTILINE)
    lines = errors or [line for line in stderr.splitlines() if line.strip()][-1:]
    return lines[0].strip()[:300] if lines else "no error message"


def check_devices(report: Mapping[str, Any], has_driver: bool) -> Check:
    """Check that NCCL and fbgemm's CUDA kernels work if there is a GPU, and that gloo is there otherwise.

    Args:
        report: the ``report`` of an ``ImportProbe``.
        has_driver: whether this machine has an NVIDIA driver.
    """
    devices: list[str] = report["devices"]
    backend = "nccl" if devices else "gloo"
    counted = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)) or "no CUDA device"
    build = f"torch for CUDA {report['cuda_build']}" if report["cuda_build"] else "torch without CUDA"
    found = f"{counted}, {build}"
    fix = INSTALL_CUDA if has_driver else INSTALL_CPU
    if report["kernel_error"]:
        return Check("devices", "fail", f"{found}; fbgemm's kernels fail: {report['kernel_error']}", fix)
    if not report[backend]:
        return Check("devices", "fail", f"{found}; this torch was built without {backend}", fix)
    if has_driver and not devices:
        advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES; with Docker, use --gpus all"
        if not report["cuda_build"]:
            advice = INSTALL_ALL_CUDA
        return Check("devices", "warn", f"{found}, but an NVIDIA driver; will run on cpu + gloo", advice)
    return Check("devices", "ok", f"{found}; will run on {'cuda' if devices else 'cpu'} + {backend}")


def installed_versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that must be compatible; None for those not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def has_nvidia_driver() -> bool:
    """Return whether the driver's management library, which fbgemm's CUDA build links to, can be loaded."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def try_imports(timeout: float = IMPORT_TIMEOUT) -> ImportProbe:
    """Import torch, fbgemm_gpu and torchrec in a new interpreter like this one, and report what they can use."""
    try:
        # -P: a folder named torch in the current directory must not be imported instead of the package.
        command = [sys.executable, "-P", "-c", _PROBE_SCRIPT]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return ImportProbe(None, "", {})
    report = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return ImportProbe(done.returncode, done.stderr, report)
