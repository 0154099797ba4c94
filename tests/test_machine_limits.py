"""Cores and memory are those of the machine, limited by control groups."""

from pathlib import Path

from mlet_dist.machine_limits import cpu_quota, memory_bytes

GIB = 1 << 30


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal:       {16 * GIB >> 10} kB\nMemFree:  1 kB\nMemAvailable:   {12 * GIB >> 10} kB\n"


def test_limits_of_every_level_of_control_groups_version_2_apply(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/box/memory.current": "1\n",
            "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
        },
    )
    assert cpu_quota(root) == 1.5
    assert memory_bytes(root) == (4 * GIB, 3 * GIB)


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}\n",
        },
    )
    assert cpu_quota(root) == 0.5
    assert memory_bytes(root) == (2 * GIB, GIB + GIB // 2)


def test_without_a_control_group_there_is_no_limit(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"proc/meminfo": MEMINFO})
    assert cpu_quota(root) is None
    assert memory_bytes(root) == (16 * GIB, 12 * GIB)
