"""A small prepared data set with single-valued, multi-valued and weighted features, written without mlet_dist."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.helpers.data_set_parts import write_part, write_schema

DENSE = ("row", "noise")
SPARSE = ("user", "genres", "item", "day", "tags")
SIZES = {"user": 40, "genres": 12, "item": 70, "day": 7, "tags": 9}
PART_ROWS, GROUP_ROWS = 330, 50


def mixed_table(rows: int, seed: int = 0) -> pa.Table:
    """Return random rows; column ``row`` holds the row number, and at least a third of the lists are empty."""
    rng = np.random.default_rng(seed)

    def lists(size: int, dtype: pa.DataType, values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, dtype))

    columns = {
        "label": pa.array(rng.integers(0, 2, rows), pa.int8()),
        "row": pa.array(np.arange(rows), pa.float32()),
        "noise": pa.array(rng.normal(size=rows), pa.float32()),
    }
    for name in SPARSE:
        if name not in ("genres", "tags"):
            columns[name] = pa.array(rng.integers(0, SIZES[name], rows), pa.int32())
            continue
        lengths = rng.integers(0, 5, rows) * (rng.random(rows) > 1 / 3)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns[name] = lists(rows, pa.int32(), rng.integers(0, SIZES[name], offsets[-1]))
        if name == "tags":
            columns["tags.weight"] = lists(rows, pa.float32(), rng.random(offsets[-1]))
    return pa.table(columns)


def write_mixed(directory: Path, rows: int, seed: int = 0) -> dict[str, pa.Table]:
    """Write train (``rows`` rows in parts of several row groups), valid and test; return their tables."""
    tables = {"train": mixed_table(rows, seed), "valid": mixed_table(301, seed + 1), "test": mixed_table(75, seed + 2)}
    parts: dict[str, list[dict[str, object]]] = {}
    for split, table in tables.items():
        (directory / split).mkdir(parents=True)
        parts[split] = []
        for start in range(0, table.num_rows, PART_ROWS):
            path = f"{split}/part-{len(parts[split]):05}.parquet"
            part = table.slice(start, PART_ROWS)
            parts[split].append(write_part(directory, path, part, row_group_size=GROUP_ROWS))
    sparse = [
        {
            "name": name,
            "num_embeddings": SIZES[name],
            "multi_valued": name in ("genres", "tags"),
            "weighted": name == "tags",
            "pooling_factor": 1.3 if name in ("genres", "tags") else 1,
        }
        for name in SPARSE
    ]
    content = {
        "format_version": 3,
        "source": "table",
        "label": "label",
        "dense": list(DENSE),
        "sparse": sparse,
        "malformed": 0,
        "preprocessing": {
            "label": {"column": "label"},
            "dense": {name: {"transform": "raw", "missing": 0.0} for name in DENSE},
            "sparse": {name: {"encoding": "vocabulary", "vocabulary": f"mixed {name}"} for name in SPARSE},
        },
        "vocabulary_id": "mixed",
        "rows": {split: table.num_rows for split, table in tables.items()},
        "parts": parts,
    }
    write_schema(directory, content)
    return tables
