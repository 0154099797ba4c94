"""Parts and the schema of a data set, written without mlet_dist, so that tests can make and change data sets."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_part(data: Path, name: str, table: pa.Table, *, positives: int = 0, **options: Any) -> dict[str, object]:
    """Write a part with the options of a ParquetWriter or of its ``write_table``; return its entry in the schema."""
    path = data / name
    row_group_size = options.pop("row_group_size", None)
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True, **options) as writer:
        writer.write_table(table, row_group_size=row_group_size)
        size = path.stat().st_size
        writer.add_key_value_metadata({"mlet_dist.pages_sha256": _sha256(path.read_bytes()[:size])})
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    return {
        "path": name,
        "rows": table.num_rows,
        "positives": positives,
        "bytes": len(content),
        "sha256": _sha256(content),
        "pages_sha256": _sha256(content[:-footer]),
        "row_group_rows": row_group_size or 1 << 20,  # as pyarrow writes them
    }


def replace_part(data: Path, name: str, table: pa.Table, **options: Any) -> None:
    """Write other rows into a part of a data set, and describe it in the schema."""
    schema = json.loads((data / "schema.json").read_text())
    parts = schema["parts"][name.partition("/")[0]]
    (index,) = (index for index, part in enumerate(parts) if part["path"] == name)
    parts[index] = write_part(data, name, table, positives=parts[index]["positives"], **options)
    schema["rows"] = {split: sum(part["rows"] for part in each) for split, each in schema["parts"].items()}
    write_schema(data, schema)


def write_schema(data: Path, content: dict[str, Any]) -> None:
    """Write ``schema.json`` with its checksum."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    checksum = _sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    (data / "schema.json").write_text(json.dumps(rest | {"sha256": checksum}, indent=2))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
