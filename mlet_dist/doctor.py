"""What ``mlet doctor`` looks at: can this machine run mlet_dist, and what to type where it cannot.

The ``judge_*`` functions are pure: facts in, a ``Check`` out. ``diagnose`` gathers the facts. torch is only ever
imported in a subprocess, because a set that does not fit together can take the interpreter down with it.
"""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

TORCH, FBGEMM, TORCHREC = "2.13.0", "1.8.0", "1.8.0"
PYTHONS = ((3, 11), (3, 12))
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")

PIP = f"{shlex.quote(sys.executable)} -m pip"
_REMOVE = f"{PIP} uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
INSTALL_CUDA = f"{_REMOVE} && {PIP} install torch=={TORCH} fbgemm-gpu=={FBGEMM} torchrec=={TORCHREC}"
INSTALL_ALL_CUDA = f"{PIP} uninstall -y torch, and then, where pip finds torch's CUDA builds: {INSTALL_CUDA}"
INSTALL_CPU = (
    f"{_REMOVE} && {PIP} install torch=={TORCH} fbgemm-gpu-cpu=={FBGEMM} torchmetrics==1.0.3 tensordict pyre-extensions"
    f" && {PIP} install --no-deps torchrec=={TORCHREC}"
)

IMPORT_TIMEOUT = 120.0
MEMORY_NEEDED, SHM_NEEDED, DISK_NEEDED = 4 << 30, 1 << 30, 5 << 30

_PROBE = """
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
    """One thing looked at.

    Attributes:
        name: what was looked at, e.g. ``memory``.
        status: ``ok``; ``warn``: it works, worse than it could; ``fail``: mlet_dist cannot run.
        found: what is there, in one line.
        advice: what to type or change; empty when the status is ``ok``.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """How importing torch, fbgemm_gpu and torchrec went in a subprocess.

    Attributes:
        returncode: its exit status, negative for a signal; None when it ran out of time.
        stderr: all it wrote there.
        report: what a successful one said of its devices, backends and kernels; else empty.
    """

    returncode: int | None
    stderr: str
    report: dict[str, Any]


def run_doctor() -> dict[str, Any]:
    """Examine this machine; return ``{"ok": no check failed, "checks": [each Check as a dict]}``."""
    checks = diagnose()
    return {"ok": all(check.status != "fail" for check in checks), "checks": [asdict(check) for check in checks]}


def report(result: Mapping[str, Any]) -> str:
    """What ``run_doctor`` found, for people: a line a check, and what to type below those that need it."""
    width = max(len(check["name"]) for check in result["checks"])
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:4}  {check['name']:{width}}  {check['found']}")
        if check["advice"]:
            lines += [f"{'':{width + 8}}{line}" for line in check["advice"].splitlines()]
    lines.append("all in order" if result["ok"] else "something is wrong: see the lines marked fail")
    return "\n".join(lines)


def diagnose() -> list[Check]:
    """Every check on this machine, in the order in which to mend what is wrong. Takes a few seconds."""
    if sys.platform != "linux":
        return [Check("system", "fail", sys.platform, "run mlet_dist on Linux; a container will do")]
    versions, has_driver = installed_versions(), has_nvidia_driver()
    probe = try_imports()
    checks = [
        judge_python(sys.version_info[:2]),
        judge_versions(versions, has_driver),
        judge_fbgemm_build(versions, has_driver),
        judge_imports(probe, has_driver),
    ]
    if probe.report:
        checks.append(judge_devices(probe.report, has_driver))
    total, available = memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return [
        *checks,
        judge_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota()),
        judge_memory(total, available),
        judge_shm(shm.total if shm else 0, shm.free if shm else 0),
        judge_disk(os.getcwd(), shutil.disk_usage(".").free),
    ]


def judge_python(version: tuple[int, int]) -> Check:
    """Python must be one that mlet_dist supports."""
    found = ".".join(map(str, version))
    if version in PYTHONS:
        return Check("python", "ok", found)
    return Check("python", "fail", found, "make a virtual environment with Python 3.11 or 3.12 and install into that")


def judge_versions(versions: Mapping[str, str | None], has_driver: bool) -> Check:
    """torch 2.X goes with fbgemm 1.(X-5) and torchrec 1.(X-5), and with nothing else."""
    mend = INSTALL_CUDA if has_driver else INSTALL_CPU
    fbgemms = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if versions[name]]
    missing = [name for name in ("torch", "torchrec") if not versions[name]] + ["fbgemm-gpu or -cpu"] * (not fbgemms)
    if missing:
        return Check("versions", "fail", f"not installed: {', '.join(missing)}", mend)
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    partner = partner_of(versions["torch"] or "")
    if partner is None:
        return Check("versions", "fail", f"{found}: no fbgemm or torchrec is known to go with this torch", mend)
    strangers = [name for name in ("torchrec", *fbgemms) if _minor(versions[name] or "") != partner]
    if strangers:
        wanted = f"{partner[0]}.{partner[1]}"
        return Check("versions", "fail", f"{found}: this torch needs {' and '.join(strangers)} {wanted}", mend)
    if _minor(versions["torch"] or "") != _minor(TORCH):
        return Check("versions", "warn", f"{found}: a set that fits, but mlet_dist is tested with torch {TORCH}", mend)
    return Check("versions", "ok", found)


def partner_of(torch_version: str) -> tuple[int, int] | None:
    """The (major, minor) of fbgemm and torchrec that go with this torch; None where there is none."""
    minor = _minor(torch_version)
    return (1, minor[1] - 5) if minor is not None and minor[0] == 2 and minor[1] >= 5 else None


def judge_fbgemm_build(versions: Mapping[str, str | None], has_driver: bool) -> Check:
    """Exactly one fbgemm build, and the one for this machine: both write the same ``fbgemm_gpu`` folder."""
    cuda, cpu = bool(versions["fbgemm-gpu"]), bool(versions["fbgemm-gpu-cpu"])
    driver = "an NVIDIA driver" if has_driver else "no NVIDIA driver"
    mend = INSTALL_CUDA if has_driver else INSTALL_CPU
    if cuda and cpu:
        return Check("fbgemm build", "fail", "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files", mend)
    if not cuda and not cpu:
        return Check("fbgemm build", "fail", "neither fbgemm-gpu nor fbgemm-gpu-cpu", mend)
    found = f"{'fbgemm-gpu (CUDA)' if cuda else 'fbgemm-gpu-cpu'}, {driver}"
    if cuda and not has_driver:
        return Check("fbgemm build", "fail", f"{found}: the CUDA build cannot be imported", INSTALL_CPU)
    if cpu and has_driver:
        return Check("fbgemm build", "warn", f"{found}: embeddings cannot use the GPU", INSTALL_CUDA)
    return Check("fbgemm build", "ok", found)


def judge_imports(probe: Probe, has_driver: bool) -> Check:
    """torch, fbgemm_gpu and torchrec must import together; where not, name the root cause, not the last error."""
    mend = INSTALL_CUDA if has_driver else INSTALL_CPU
    if probe.report:
        return Check("imports", "ok", "torch, fbgemm_gpu and torchrec import together")
    retry = f"{shlex.quote(sys.executable)} -X faulthandler -c 'import torch, fbgemm_gpu, torchrec'"
    if probe.returncode is None:
        return Check("imports", "fail", f"not imported after {IMPORT_TIMEOUT:.0f} s", f"see where it hangs: {retry}")
    if probe.returncode < 0:
        name = signal.Signals(-probe.returncode).name
        return Check("imports", "fail", f"the interpreter died of {name} while importing", f"see where: {retry}")
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
        return Check("imports", "fail", f"{found} (builds that do not belong together)", mend)
    return Check("imports", "fail", found, f"see all of it: {retry}")


def root_cause(stderr: str) -> str:
    """The first error of a chain of tracebacks: Python prints the cause before what it led to."""
    errors = re.findall(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): .+", stderr, flags=re.MULTILINE)
    lines = errors or [line for line in stderr.splitlines() if line.strip()][-1:]
    return lines[0].strip()[:300] if lines else "no error message"


def judge_devices(report: Mapping[str, Any], has_driver: bool) -> Check:
    """A GPU needs NCCL and fbgemm's CUDA kernels; without one, gloo must be there."""
    devices: list[str] = report["devices"]
    backend = "nccl" if devices else "gloo"
    counted = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)) or "no CUDA device"
    build = f"torch for CUDA {report['cuda_build']}" if report["cuda_build"] else "torch without CUDA"
    found = f"{counted}, {build}"
    mend = INSTALL_CUDA if has_driver else INSTALL_CPU
    if report["kernel_error"]:
        return Check("devices", "fail", f"{found}; fbgemm's kernels fail: {report['kernel_error']}", mend)
    if not report[backend]:
        return Check("devices", "fail", f"{found}; this torch was built without {backend}", mend)
    if has_driver and not devices:
        advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; for Docker, add --gpus all"
        if not report["cuda_build"]:
            advice = INSTALL_ALL_CUDA
        return Check("devices", "warn", f"{found}, yet an NVIDIA driver; will run on cpu + gloo", advice)
    return Check("devices", "ok", f"{found}; will run on {'cuda' if devices else 'cpu'} + {backend}")


def judge_cores(affinity: int, machine: int, quota: float | None) -> Check:
    """Cores this process may use: the CPU affinity and the container's quota both bound them."""
    cores = min(float(affinity), quota or affinity)
    found = f"{cores:g} of {machine}"
    if cores < 2:
        advice = "give it 2 or more (docker --cpus, k8s limits.cpu)"
        return Check("cores", "warn", f"{found}: ranks will take turns", advice)
    return Check("cores", "ok", found)


def judge_memory(total: int, available: int) -> Check:
    """Memory free for the ranks; each needs about 1 GiB before its tables."""
    found = f"{_gib(available)} free of {_gib(total)}"
    if available < MEMORY_NEEDED:
        advice = (
            "stop other programs, raise the container's limit (docker --memory, k8s limits.memory), or use fewer ranks"
        )
        return Check("memory", "warn", found, advice)
    return Check("memory", "ok", found)


def judge_shm(total: int, free: int) -> Check:
    """/dev/shm carries batches between loader processes and gradients between NCCL ranks."""
    found = f"{_gib(free)} free of {_gib(total)}"
    if total < SHM_NEEDED:
        advice = "docker run --shm-size=2g (or --ipc=host); in k8s mount an emptyDir with medium: Memory at /dev/shm"
        return Check("/dev/shm", "warn", found, advice)
    if free < SHM_NEEDED:
        return Check("/dev/shm", "warn", found, "ls -la /dev/shm, and remove what dead processes left there")
    return Check("/dev/shm", "ok", found)


def judge_disk(folder: str, free: int) -> Check:
    """Room for prepared data and checkpoints in the current folder."""
    found = f"{_gib(free)} free in {folder}"
    if free < DISK_NEEDED:
        return Check("disk", "warn", found, "make room (df -h .), or point data.path and run.dir at a larger disk")
    return Check("disk", "ok", found)


def installed_versions() -> dict[str, str | None]:
    """What pip's records say is installed of the packages that must fit together; None where not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def has_nvidia_driver() -> bool:
    """Whether the driver's management library, which fbgemm's CUDA build links to, can be loaded."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def try_imports(timeout: float = IMPORT_TIMEOUT) -> Probe:
    """Import torch, fbgemm_gpu and torchrec in a fresh interpreter like this one, and ask what they can use."""
    try:
        # -P: a folder named torch where the user happens to stand must not be taken for the package.
        command = [sys.executable, "-P", "-c", _PROBE]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Probe(None, "", {})
    report = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return Probe(done.returncode, done.stderr, report)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores the control groups allow this process; None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        v1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        words = (_read(folder / "cpu.max") or v1).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes in total and still available to this process, by the machine and its control groups."""
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", _read(root / "proc/meminfo"), flags=re.MULTILINE))
    total, available = int(fields["MemTotal"]) << 10, int(fields["MemAvailable"]) << 10
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    v2 = ("memory.max", "memory.current", "inactive_file")
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, reclaimable in (v1, v2):
            limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if limit.isdigit() and usage.isdigit():
                cached = re.search(rf"^{reclaimable} (\d+)", _read(folder / "memory.stat"), flags=re.MULTILINE)
                used = int(usage) - (int(cached[1]) if cached else 0)
                total, available = min(total, int(limit)), min(available, max(0, int(limit) - used))
    return total, available


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / (controller if controllers else "")
            inner = base / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(base))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
