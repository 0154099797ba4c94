"""Tables for people who read text."""

from collections.abc import Sequence
from typing import Any


def text_table(names: Sequence[str], rows: Sequence[Sequence[Any]], left: int) -> list[str]:
    """Lines of aligned columns; the first ``left`` begin at the left, the others end at the right."""
    table = [list(map(str, row)) for row in [names, *rows]]
    widths = [max(len(row[index]) for row in table) for index in range(len(names))]
    return [
        "  ".join(
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
