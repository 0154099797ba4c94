"""`mlet doctor`: what a machine, or the container on it, has, and everything that is checked before a run."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlet_dist.cluster.software_checks import (
    Check,
    has_nvidia_driver,
    installed_versions,
    judge_devices,
    judge_fbgemm_build,
    judge_imports,
    judge_python,
    judge_versions,
    try_imports,
)

MEMORY_NEEDED, SHM_NEEDED, DISK_NEEDED = 4 << 30, 1 << 30, 5 << 30


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


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def run_doctor() -> dict[str, Any]:
    """Examine this machine; return ``{"ok": no check failed, "checks": [each Check as a dict]}``."""
    checks = diagnose()
    return {"ok": all(check.status != "fail" for check in checks), "checks": [asdict(check) for check in checks]}


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
