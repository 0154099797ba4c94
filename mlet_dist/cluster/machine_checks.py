"""`mlet doctor`: check the software of this machine or container, its cores, memory and disk."""

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
    check_devices,
    check_fbgemm_build,
    check_imports,
    check_python,
    check_versions,
    has_nvidia_driver,
    installed_versions,
    try_imports,
)

MEMORY_NEEDED, SHM_NEEDED, DISK_NEEDED = 4 << 30, 1 << 30, 5 << 30


def run_doctor() -> dict[str, Any]:
    """Check this machine; return ``{"ok": no check failed, "checks": [each Check as a dict]}``."""
    checks = run_checks()
    return {"ok": all(check.status != "fail" for check in checks), "checks": [asdict(check) for check in checks]}


def run_checks() -> list[Check]:
    """Run every check on this machine, in the order in which to fix what fails. This takes a few seconds."""
    if sys.platform != "linux":
        return [Check("system", "fail", sys.platform, "run mlet_dist on Linux, for example in a container")]
    versions, has_driver = installed_versions(), has_nvidia_driver()
    probe = try_imports()
    checks = [
        check_python(sys.version_info[:2]),
        check_versions(versions, has_driver),
        check_fbgemm_build(versions, has_driver),
        check_imports(probe, has_driver),
    ]
    if probe.report:
        checks.append(check_devices(probe.report, has_driver))
    total, available = memory_bytes()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return [
        *checks,
        check_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota()),
        check_memory(total, available),
        check_shm(shm.total if shm else 0, shm.free if shm else 0),
        check_disk(os.getcwd(), shutil.disk_usage(".").free),
    ]


def check_cores(affinity: int, machine: int, quota: float | None) -> Check:
    """Check the number of cores that this process may use, which CPU affinity and the container's quota limit."""
    cores = min(float(affinity), quota or affinity)
    found = f"{cores:g} of {machine}"
    if cores < 2:
        advice = "allow 2 or more cores (Docker --cpus, Kubernetes limits.cpu)"
        return Check("cores", "warn", f"{found}: ranks will share a core", advice)
    return Check("cores", "ok", found)


def check_memory(total: int, available: int) -> Check:
    """Check the free memory; each rank needs about 1 GiB besides its tables."""
    found = f"{_gib(available)} free of {_gib(total)}"
    if available < MEMORY_NEEDED:
        advice = (
            "stop other programs, use fewer ranks, or raise the container's limit (Docker --memory, Kubernetes "
            "limits.memory)"
        )
        return Check("memory", "warn", found, advice)
    return Check("memory", "ok", found)


def check_shm(total: int, free: int) -> Check:
    """Check /dev/shm, which carries batches between loader processes and gradients between NCCL ranks."""
    found = f"{_gib(free)} free of {_gib(total)}"
    if total < SHM_NEEDED:
        advice = (
            "with Docker use --shm-size=2g or --ipc=host; in Kubernetes mount an emptyDir with medium: Memory at "
            "/dev/shm"
        )
        return Check("/dev/shm", "warn", found, advice)
    if free < SHM_NEEDED:
        return Check("/dev/shm", "warn", found, "see `ls -la /dev/shm`, and remove the files of dead processes")
    return Check("/dev/shm", "ok", found)


def check_disk(folder: str, free: int) -> Check:
    """Check the free space for prepared data and checkpoints in the current directory."""
    found = f"{_gib(free)} free in {folder}"
    if free < DISK_NEEDED:
        advice = "free some space (see `df -h .`), or set data.path and run.dir to a larger disk"
        return Check("disk", "warn", found, advice)
    return Check("disk", "ok", found)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the number of cores that the control groups allow this process; None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        v1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        fields = (_read(folder / "cpu.max") or v1).split()
        if len(fields) == 2 and fields[0] not in ("max", "-1"):
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Return the bytes in total and still available to this process, limited by the machine and its control groups."""
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
