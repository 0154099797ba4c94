"""Invented columns, and data sets that are prepared with the description of a raw file."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mlet_dist.data.describe import describe
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.file_lists import expand
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_files import inspect_file
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema

ROWS = 240


def table(**columns: Sequence[object]) -> bytes:
    """Return columns as CSV."""
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    return "".join(f"{line}\n" for line in lines).encode()


def drawn(*values: object, seed: int = 0, rows: int = ROWS) -> list[object]:
    rng = random.Random(seed)
    return [rng.choice(values) for _ in range(rows)]


def spread(low: int, high: int, seed: int = 1, rows: int = ROWS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(low, high) for _ in range(rows)]


LABEL = drawn(0, 0, 1, seed=9)


def described(raw: object) -> dict[str, Any]:
    """Return the content of the description of a raw file."""
    content: dict[str, Any] = yaml.safe_load(describe(str(raw)).text)
    return content


def round_trip(raw: object, tmp_path: Path) -> tuple[DatasetSchema, dict[str, Any]]:
    """Return the schema of the data set that is prepared with the description, and the description."""
    text = describe(str(raw)).text
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    spec = load_table(path, partial(_columns, str(raw)))
    out = tmp_path / "out"
    schema = prepare(spec, [str(raw)], out)
    assert schema is not None
    assert check(out) == schema
    return schema, yaml.safe_load(text)


def features(description: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """Return the keys of each column of a section of a description, by the column's name, without ranges."""
    found: dict[str, dict[str, Any]] = {}
    for entry in description.get(section) or []:
        rest = {key: value for key, value in entry.items() if key not in ("column", "columns", "min_count")}
        for name in entry.get("columns") or [entry["column"]]:
            assert name not in found
            found[name] = rest
    return found


def _columns(raw: str, text: Any) -> tuple[str, ...]:
    return inspect_file(expand([raw])[0], text, ()).columns
