"""Hardware that is planned for: presets of ``hardware.yaml``, or a file of one's own."""

from pathlib import Path
from typing import Any

from mlet_dist.config.parser import load_yaml
from mlet_dist.errors import UserError

_FIELDS = {
    "memory_gb": ("memory", 1e9),
    "memory_bandwidth_gbs": ("memory_bandwidth", 1e9),
    "fp32_tflops": ("flops", 1e12),
    "node_gbs": ("node_bandwidth", 1e9),
    "network_gbs": ("network_bandwidth", 1e9),
}
# A CPU's memory is its host's.
_HOST_FIELDS = {"host_memory_gb": ("host_memory", 1e9), "host_link_gbs": ("host_bandwidth", 1e9)}
_MOST = 1e9  # TorchRec counts a device's bytes as an int64


Hardware = dict[str, Any]
"""The arguments of ``embeddings.step_time.Device``, which this module does not import: that would import torch."""


def presets() -> dict[str, Hardware]:
    """By name, in the order of the file."""
    path = Path(__file__).with_name("hardware.yaml")
    return {name: _hardware(path, name, entry) for name, entry in load_yaml(path, "hardware").items()}


def load_hardware(name: str) -> Hardware:
    """A preset by name, or the one entry of a YAML file.

    Raises:
        UserError: no such preset or file, or an entry that lacks a number.
    """
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--device {name}: no such preset; there are {', '.join(known)}, or the path of a YAML file")
    entries = load_yaml(path, "hardware")
    if not isinstance(entries, dict) or len(entries) != 1:
        raise UserError(f"{path}: expected one entry, a name with {', '.join(['kind', *_FIELDS, *_HOST_FIELDS])}")
    ((own, entry),) = entries.items()
    return _hardware(path, str(own), entry)


def _hardware(path: Path, name: str, entry: Any) -> Hardware:
    numbers = _FIELDS | _HOST_FIELDS
    if isinstance(entry, dict) and entry.get("kind") == "cpu":
        numbers = _FIELDS
    known = ["kind", *numbers]
    if not isinstance(entry, dict) or set(entry) != set(known):
        found = sorted(map(str, entry)) if isinstance(entry, dict) else [type(entry).__name__]
        raise UserError(f"{path}: {name}: expected the keys {', '.join(known)}, found {', '.join(found)}")
    if entry["kind"] not in ("cuda", "cpu"):
        raise UserError(f"{path}: {name}.kind is {entry['kind']!r}, it must be cuda or cpu")
    values = {}
    for key, (attribute, unit) in numbers.items():
        value = entry[key]
        if type(value) not in (int, float) or not 0 < value <= _MOST:
            raise UserError(f"{path}: {name}.{key} is {value!r}, it must be a number above 0, at most {_MOST:.0e}")
        values[attribute] = value * unit
    return {"name": name, "kind": entry["kind"], **values}
