"""The inputs of a plan: hardware from presets or a file, and the sizes of tables from a data set or a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.strict_yaml import load_yaml
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, DatasetSchema, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FIELDS = {
    "memory_gb": ("memory", 1e9),
    "memory_bandwidth_gbs": ("memory_bandwidth", 1e9),
    "fp32_tflops": ("flops", 1e12),
    "node_gbs": ("node_bandwidth", 1e9),
    "network_gbs": ("network_bandwidth", 1e9),
}
# Not for a CPU, whose memory is the host's.
_HOST_FIELDS = {"host_memory_gb": ("host_memory", 1e9), "host_link_gbs": ("host_bandwidth", 1e9)}
_OPTIONAL_FIELDS = {
    "tf32_tflops": ("tf32_flops", 1e12),
    "bf16_tflops": ("bf16_flops", 1e12),
    "launch_us": ("launch", 1e-6),
}
_MAX = 1e9  # TorchRec stores the bytes of a device in an int64
_DENSE_FEATURES = 13  # as in Criteo
_KEYS = ("num_embeddings", "pooling_factor")


PRECISIONS = {"tf32": "tf32_flops", "bf16": "bf16_flops"}
"""The key in ``Hardware`` of the operations per second in each precision, which may be missing."""

Hardware = dict[str, Any]
"""Numbers of a device, for ``hardware_rates.build_device``, which is not imported here, because it imports torch."""


def presets() -> dict[str, Hardware]:
    """Return the presets of hardware.yaml by name, in the order of the file."""
    path = Path(__file__).with_name("hardware.yaml")
    return {name: _hardware(path, name, entry) for name, entry in load_yaml(path, "hardware").items()}


def load_hardware(name: str) -> Hardware:
    """Return a preset by name, or the only entry of a YAML file.

    Raises:
        UserError: there is no such preset or file, or a number is missing or out of range.
    """
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--device {name}: no such preset; use {', '.join(known)}, or the path of a YAML file")
    entries = load_yaml(path, "hardware")
    if not isinstance(entries, dict) or len(entries) != 1:
        raise UserError(
            f"{path}: expected one entry: a name and the keys {', '.join(['kind', *_FIELDS, *_HOST_FIELDS])}"
        )
    ((own, entry),) = entries.items()
    return _hardware(path, str(own), entry)


def _hardware(path: Path, name: str, entry: Any) -> Hardware:
    """Check an entry of a hardware file, and convert its numbers to bytes, bytes/s and FLOP/s."""
    numbers = _FIELDS | _HOST_FIELDS
    if isinstance(entry, dict) and entry.get("kind") == "cpu":
        numbers = _FIELDS
    known = ["kind", *numbers]
    if not isinstance(entry, dict) or set(entry) - set(_OPTIONAL_FIELDS) != set(known):
        found = sorted(map(str, entry)) if isinstance(entry, dict) else [type(entry).__name__]
        raise UserError(
            f"{path}: {name}: expected the keys {', '.join(known)}, and perhaps {', '.join(_OPTIONAL_FIELDS)}, found "
            f"{', '.join(found)}"
        )
    if entry["kind"] not in ("cuda", "cpu"):
        raise UserError(f"{path}: {name}.kind is {entry['kind']!r}, it must be cuda or cpu")
    values = {}
    optional = {key: field for key, field in _OPTIONAL_FIELDS.items() if key in entry}
    for key, (attribute, unit) in (numbers | optional).items():
        value = entry[key]
        if type(value) not in (int, float) or not 0 < value <= _MAX:
            raise UserError(f"{path}: {name}.{key} is {value!r}, it must be a number above 0, at most {_MAX:.0e}")
        values[attribute] = value * unit
    return {"name": name, "kind": entry["kind"], **values}


def load_tables(config: Config, path: Path | None) -> tuple[ModelSpec, dict[str, float]]:
    """Return the model of the config, and the pooling factor of each table.

    Args:
        path: a YAML file of table names, each with its ``num_embeddings``, or with a section of ``num_embeddings`` and
            ``pooling_factor``; None takes the tables of the config's data set.

    Raises:
        UserError: the file or the data set cannot be read, or lacks a table that the config names.
    """
    if path is None:
        spec = ModelSpec.of(config, DatasetSchema.load(data_set_path(config.data.path)))
        return spec, spec.pooling_factors
    if config.compression.policy != "none":
        raise UserError(
            f"compression.policy is {config.compression.policy}, which needs the counts of a data set's ids; {path} "
            "gives only the sizes of tables: name a data set, or use policy none"
        )
    sizes: dict[str, int] = {}
    pooling: dict[str, float] = {}
    for key, entry in _read(path).items():
        name = str(key)
        if type(key) not in (str, int):
            raise UserError(f"{path}: table {key!r}: a table's name must be text; put it in quotes")
        if name in sizes:
            raise UserError(f"{path}: table {name!r} is given twice")
        if isinstance(entry, dict):
            if "num_embeddings" not in entry or set(entry) - set(_KEYS):
                raise UserError(
                    f"{path}: table {name!r}: expected {' and '.join(_KEYS)}, found {', '.join(map(str, entry))}"
                )
            size, factor = entry["num_embeddings"], entry.get("pooling_factor", 1.0)
        else:
            size, factor = entry, 1.0
        if type(size) is not int or not 1 <= size <= MAX_NUM_EMBEDDINGS:
            raise UserError(
                f"{path}: table {name!r}: num_embeddings is {size!r}, it must be a whole number from 1 to "
                f"{MAX_NUM_EMBEDDINGS}"
            )
        if type(factor) not in (int, float) or not 0 < factor <= MAX_NUM_EMBEDDINGS:
            raise UserError(
                f"{path}: table {name!r}: pooling_factor is {factor!r}, it must be a number above 0, at most "
                f"{MAX_NUM_EMBEDDINGS}"
            )
        sizes[name], pooling[name] = size, float(factor)
    wanted = config.data.sparse_features or tuple(sizes)
    for name in wanted:
        if name not in sizes:
            raise UserError(f"data.sparse_features: {path} has no table {name!r}; it has {', '.join(sizes)}")
    config.check_tables(wanted)
    dense = config.data.dense_features or tuple(f"I{index}" for index in range(1, _DENSE_FEATURES + 1))
    features = tuple(
        SparseFeature(name, sizes[name], multi_valued=pooling[name] != 1, pooling_factor=pooling[name])
        for name in wanted
    )
    spec = ModelSpec(config.model, dense, features, config.train.seed).with_model(config)
    return spec, {name: pooling[name] for name in wanted}


def load_lookups(config: Config, spec: ModelSpec) -> "dict[str, npt.NDArray[np.int64]]":
    """Return how often the config's data set looks up each row, for the tables that have a vocabulary.

    Raises:
        UserError: the data set cannot be read.
    """
    from mlet_dist.data.row_counts import vocabulary_counts

    path = data_set_path(config.data.path)
    schema = DatasetSchema.load(path)
    found = {table.name: vocabulary_counts(path, schema, table.name) for table in spec.tables}
    return {name: counts for name, counts in found.items() if counts is not None}


def _read(path: Path) -> dict[Any, Any]:
    """Return the entries of a file of table sizes."""
    entries = load_yaml(path, "tables")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: expected one line for each table, such as `C1: 45000000`")
    return entries
