"""How many cores and how much memory this process may use: the machine's, or the limits of its control groups."""

import os
import re
from collections.abc import Iterator
from pathlib import Path


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
    if not fields:  # not Linux
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
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
