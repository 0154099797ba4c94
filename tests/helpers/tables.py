"""Tables prepared with a description, and the values that the ids of the data set stand for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema

PLAIN: dict[str, Any] = {"format": "csv", "label": {"column": "y"}, "sparse": [{"column": "x"}]}


def prepare_table(
    out: Path, description: Mapping[str, Any], raw: Sequence[str | Path] | Mapping[str, Sequence[str | Path]]
) -> DatasetSchema:
    """Prepare and check the data set ``out``; the description is written beside it."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(dict(description), sort_keys=False))
    schema = prepare(load_table(path), raw, out)
    assert schema is not None
    assert check(out) == schema
    return schema


def values_of(out: Path, feature: str = "x", split: str | None = None) -> list[Any]:
    """Return the value of a feature, or its list of values, in each row of a split or of all; None for id 0."""
    vocabulary = [None, *pq.read_table(out / f"vocabulary/{feature}.parquet")["value"].to_pylist()]
    schema = DatasetSchema.load(out)
    rows = [
        row[feature]
        for name, parts in schema.parts.items()
        if split in (None, name)
        for part in parts
        for row in pq.read_table(out / part.path).to_pylist()
    ]
    return [[vocabulary[id] for id in row] if isinstance(row, list) else vocabulary[row] for row in rows]
