import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.data_set_parts import replace_part


@pytest.fixture(scope="package")
def data_that_overflows(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set, with values in its eleventh batch of 64 that float32 holds and products of them not."""
    out = tmp_path_factory.mktemp("overflow") / "data"
    shutil.copytree(small_data, out)
    (part,) = (out / "train").iterdir()
    table = pq.read_table(part)
    columns = {name: table.column(name).to_pylist() for name in table.schema.names}
    for name, values in columns.items():
        if name.startswith("I"):
            values[64 * 10 + 40] = 3e38
    replace_part(out, f"train/{part.name}", pa.table(columns, schema=table.schema))
    return out
