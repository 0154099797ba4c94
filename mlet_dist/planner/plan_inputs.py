"""Sizes of the tables that are planned: from the config's data set, or from a file where there is none yet."""

from pathlib import Path
from typing import Any

from mlet_dist.config.parser import load_yaml
from mlet_dist.config.sections import Config
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, DatasetSchema, SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec

_DENSE_FEATURES = 13  # Criteo's
_KEYS = ("num_embeddings", "pooling_factor")


def load_tables(config: Config, path: Path | None) -> tuple[ModelSpec, dict[str, float]]:
    """The model that ``config`` asks for, and ids a bag by table.

    Args:
        path: a YAML file of table names, each with its ``num_embeddings`` or with a section of that and
            ``pooling_factor``; None takes the tables of the config's data set.

    Raises:
        UserError: the file or the data set cannot be read, or lacks a table that the config names.
    """
    if path is None:
        spec = ModelSpec.of(config, DatasetSchema.load(data_set_path(config.data.path)))
        return spec, spec.pooling_factors
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
    return ModelSpec(config.model, dense, features, config.train.seed), {name: pooling[name] for name in wanted}


def _read(path: Path) -> dict[Any, Any]:
    entries = load_yaml(path, "tables")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: expected a line a table, such as `C1: 45000000`")
    return entries
