"""What ``mlet doctor`` looks at: can this machine run mlet_dist, and what to type where it cannot.

The ``judge_*`` functions are pure: facts in, a ``Check`` out. ``diagnose`` gathers the facts.
"""

import os
import shutil
import sys
from dataclasses import asdict
from typing import Any

from mlet_dist.cluster.check import Check
from mlet_dist.cluster.machine_checks import cpu_quota, judge_cores, judge_disk, judge_memory, judge_shm, memory
from mlet_dist.cluster.software_checks import (
    has_nvidia_driver,
    installed_versions,
    judge_devices,
    judge_fbgemm_build,
    judge_imports,
    judge_python,
    judge_versions,
    try_imports,
)


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
