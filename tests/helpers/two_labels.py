"""A prepared data set of two labels: clicks, and conversions that are known where a row was clicked."""

from pathlib import Path

import numpy as np
import yaml

from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table

LABELS = [{"column": "click"}, {"column": "conv", "name": "conversion", "missing": "unknown"}]


def two_labels(directory: Path, rows: int = 2_003, **changes: object) -> Path:
    """Write raw rows and prepare them; ``changes`` are keys of the description. Return the data set."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 40, rows), rng.integers(0, 9, rows)
    price, weight = rng.normal(size=rows), rng.integers(0, 4, rows)
    click = rng.random(rows) < 1 / (1 + np.exp(-(a % 5 - 2 + 0.5 * price)))
    conversion = click & (rng.random(rows) < 1 / (1 + np.exp(-(b % 3 - 1.0))))
    columns = zip(click, conversion, a, b, price, weight, strict=True)
    lines = [f"{int(c)},{int(v) if c else ''},{x},{y},{p:.3f},{w}" for c, v, x, y, p, w in columns]
    raw = directory / "raw.csv"
    raw.write_text("\n".join(["click,conv,a,b,price,weight", *lines]) + "\n")
    description = {
        "format": "csv",
        "label": LABELS,
        "dense": [{"column": "price", "transform": "raw"}],
        "sparse": [{"column": "a"}, {"column": "b"}],
        "split": {"by": "rows", "shares": {"train": 0.7, "valid": 0.15, "test": 0.15}},
        **changes,
    }
    (directory / "table.yaml").write_text(yaml.safe_dump(description))
    prepare(load_table(directory / "table.yaml"), [raw], directory / "data")
    return directory / "data"
