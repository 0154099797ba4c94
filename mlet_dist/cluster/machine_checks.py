"""`mlet doctor`: check the software of this machine or container, its cores, memory and disk."""

import os
import shutil
import sys
from dataclasses import asdict
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
from mlet_dist.machine_limits import cpu_quota, memory_bytes

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


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
