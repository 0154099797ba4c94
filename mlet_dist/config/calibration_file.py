"""The file of rates that `mlet doctor --distributed --calibrate` measures and `mlet plan --calibration` reads."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mlet_dist.atomic_file import replaced_file
from mlet_dist.config.strict_yaml import load_yaml
from mlet_dist.errors import UserError

FORMAT = 1
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
COLLECTIVES = ("all_to_all", "all_reduce", "reduce_scatter", "all_gather")

_MAX_RANKS, _MAX_GROUPS, _MAX_TEXT = 1 << 17, 4096, 256
_SECONDS, _RATE, _FLOPS = (0, 1e9), (1e-6, 1e9), (1e-9, 1e9)
_LIMITS = {
    "memory_bandwidth_gbs": _RATE,
    "tflops": _FLOPS,
    "million_ids_per_s": _RATE,
    "launch_us": _SECONDS,
    "host_step_us": _SECONDS,
    "host_table_us": _SECONDS,
}


@dataclass(frozen=True)
class GroupRates:
    """The times of one collective in groups of one size.

    Attributes:
        collective: all_to_all, all_reduce, reduce_scatter or all_gather.
        ranks: the ranks of a group.
        nodes: the nodes of a group.
        latency_us: microseconds of the smallest message.
        gbs: GB (10^9 bytes) that a rank sends per second, of a large message.
    """

    collective: str
    ranks: int
    nodes: int
    latency_us: float
    gbs: float


@dataclass(frozen=True)
class Calibration:
    """Rates of a cluster's ranks, measured while all of them worked.

    Attributes:
        date: when they were measured, in ISO 8601.
        device: cpu or cuda.
        backend: gloo or nccl.
        hosts: the names of the hosts.
        versions: the versions of packages.
        world_size: the number of ranks.
        local_world_size: the ranks of each node.
        threads: torch's threads of each rank.
        memory_bandwidth_gbs: GB per second that a rank reads and writes when it gathers and updates rows.
        tflops: 10^12 float32 operations per second of matrix products.
        million_ids_per_s: ids among which a rank finds the distinct ones.
        launch_us: microseconds of one small operation.
        host_step_us: microseconds of a step without tables, rows and the latency of collectives.
        host_table_us: microseconds that each table adds.
        groups: the times of collectives.
    """

    date: str
    device: str
    backend: str
    hosts: tuple[str, ...]
    versions: dict[str, str]
    world_size: int
    local_world_size: int
    threads: int
    memory_bandwidth_gbs: float
    tflops: float
    million_ids_per_s: float
    launch_us: float
    host_step_us: float
    host_table_us: float
    groups: tuple[GroupRates, ...]


def write_calibration(path: Path, found: Calibration) -> None:
    """Write the file; an earlier one stays until the new one is complete.

    Raises:
        UserError: the file cannot be written.
    """
    content = {"format": FORMAT, **asdict(found), "hosts": list(found.hosts)}
    content["groups"] = [asdict(group) for group in found.groups]
    text = "# Measured by `mlet doctor --distributed --calibrate`, for `mlet plan --calibration`.\n"
    text += yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    try:
        with replaced_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"--calibrate {path}: cannot be written: {error.strerror}") from None


def load_calibration(path: Path) -> Calibration:
    """Return the content of a calibration file.

    Raises:
        UserError: the file cannot be read, has unknown or missing keys, or a value is out of range.
    """
    content = load_yaml(path, "calibration")
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(
            f"{path}: not a calibration; `mlet doctor --distributed --calibrate FILE` writes one on a cluster"
        )
    content = dict(content)
    found = content.pop("format")
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}, and this version reads {FORMAT}; calibrate again")
    _check_keys(path, "", content, [each.name for each in fields(Calibration)])
    for key in ("date", "device", "backend"):
        _check_text(path, key, content[key])
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}T[\d:.]+(\+00:00|Z)", content["date"]):
        raise UserError(f"{path}: date is {content['date']!r}, it must be a time such as 2026-11-30T01:02:03+00:00")
    if BACKENDS.get(content["device"]) != content["backend"]:
        raise UserError(
            f"{path}: device is {content['device']!r} and backend is {content['backend']!r}; they must be cpu and "
            "gloo, or cuda and nccl"
        )
    for key in ("world_size", "local_world_size", "threads"):
        _check_number(path, key, content[key], 1, _MAX_RANKS, whole=True)
    if content["world_size"] % content["local_world_size"]:
        raise UserError(f"{path}: world_size {content['world_size']} is not a multiple of local_world_size")
    for key, (least, most) in _LIMITS.items():
        _check_number(path, key, content[key], least, most)
    hosts, versions = content["hosts"], content["versions"]
    if not isinstance(hosts, list) or not hosts or len(hosts) > _MAX_RANKS:
        raise UserError(f"{path}: hosts is {hosts!r}, it must be a list of names")
    if not isinstance(versions, dict):
        raise UserError(f"{path}: versions is {versions!r}, it must give the version of each package")
    for index, host in enumerate(hosts):
        _check_text(path, f"hosts[{index}]", host)
    for name, version in versions.items():
        _check_text(path, f"versions.{name}", version)
    content |= {"hosts": tuple(hosts), "groups": _groups(path, content["groups"], content["world_size"])}
    return Calibration(**content)


def _groups(path: Path, groups: Any, world_size: int) -> tuple[GroupRates, ...]:
    if not isinstance(groups, list) or len(groups) > _MAX_GROUPS:
        raise UserError(f"{path}: groups must be a list of at most {_MAX_GROUPS:,} entries")
    found: dict[tuple[str, int, int], GroupRates] = {}
    for index, group in enumerate(groups):
        where = f"groups[{index}]"
        if not isinstance(group, dict):
            raise UserError(f"{path}: {where} is {group!r}, it must be an entry of collective, ranks and times")
        _check_keys(path, f"{where}.", group, [each.name for each in fields(GroupRates)])
        if group["collective"] not in COLLECTIVES:
            raise UserError(
                f"{path}: {where}.collective is {group['collective']!r}, it must be one of {', '.join(COLLECTIVES)}"
            )
        _check_number(path, f"{where}.ranks", group["ranks"], 2, world_size, whole=True)
        _check_number(path, f"{where}.nodes", group["nodes"], 1, group["ranks"], whole=True)
        _check_number(path, f"{where}.latency_us", group["latency_us"], 1e-3, _SECONDS[1])
        _check_number(path, f"{where}.gbs", group["gbs"], *_RATE)
        key = (group["collective"], group["ranks"], group["nodes"])
        if key in found:
            raise UserError(f"{path}: {where}: {key[0]} of {key[1]} ranks on {key[2]} nodes is given twice")
        found[key] = GroupRates(**group)
    missing = set(COLLECTIVES) - {collective for collective, *_ in found}
    if world_size > 1 and missing:
        raise UserError(f"{path}: groups has no {' and no '.join(sorted(missing))}; calibrate again")
    return tuple(found.values())


def _check_keys(path: Path, where: str, found: dict[Any, Any], known: list[str]) -> None:
    unknown = [str(key) for key in found if key not in known]
    missing = [key for key in known if key not in found]
    if unknown:
        raise UserError(f"{path}: unknown key {where}{unknown[0]}; the keys are {', '.join(known)}")
    if missing:
        raise UserError(f"{path}: {where}{missing[0]} is missing; calibrate again")


def _check_text(path: Path, key: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise UserError(f"{path}: {key} is {value!r}, it must be text of at most {_MAX_TEXT} characters, in quotes")


def _check_number(path: Path, key: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{path}: {key} is {value!r}, it must be {kind} from {least:g} to {most:,g}")
