"""What `mlet export --budget` prints: the candidates that were measured, and what the best one costs."""

from collections.abc import Mapping
from typing import Any

from mlet_dist.formatting import text_table


def budget_table(result: Mapping[str, Any]) -> str:
    """Return the candidates of a result of ``export_within`` as a table, the best first, and a sentence on it."""
    header = ("output", "rows", "columns", "bytes", "of float32", "LogLoss", "change")
    lines = [
        (
            each["output"],
            each["rows"],
            str(each["embedding_dim"]),
            f"{each['bytes']:,}",
            f"1/{result['table_bytes'] / each['bytes']:.1f}",
            f"{each['logloss']:.5f}",
            f"{each['change']:+.5f}",
        )
        for each in result["candidates"]
    ]
    best = result["chosen"]
    return "\n".join(
        [
            f"{result['rows']:,} rows of valid; budget {result['budget']:,} bytes; LogLoss of the float32 tables, "
            f"{result['table_bytes']:,} bytes: {result['logloss']:.5f}",
            *text_table(header, lines, left=2),
            f"exported: {best['output']} of {best['embedding_dim']} columns, {best['bytes']:,} bytes, "
            f"{best['change']:+.5f} LogLoss",
        ]
    )
