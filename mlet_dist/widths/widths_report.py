"""Shows what compression did to the tables of a run as text."""

from typing import Any

from mlet_dist.formatting import text_table

_NAME_WIDTH = 22  # characters


def text_report(result: dict[str, Any]) -> str:
    """Return the text that `mlet widths` prints.

    Args:
        result: of ``widths_of``.
    """
    widths = [each["width"] for each in result["widths"]]
    names = ["table", "rows", *(f"w={width}" for width in widths)]
    lines = [
        [each["name"], f"{each['num_embeddings']:,}", *_cells(each["widths"], widths)] for each in result["tables"]
    ]
    rows = sum(each["num_embeddings"] for each in result["tables"])
    lines.append(["all tables", f"{rows:,}", *_cells(result["widths"], widths)])
    lines.append(["  of lookups", "", *_cells(result["widths"], widths, "lookups")])
    if result["history"]:
        last = result["history"][-1]["kept"]
        stored = sum(last[each["name"]] * each["num_embeddings"] for each in result["tables"])
        kept = [*(last[each["name"]] for each in result["tables"]), stored / rows]
        names.append("kept now")
        lines = [[*line, share] for line, share in zip(lines, [*(f"{each:.1%}" for each in kept), ""], strict=True)]
    about = [f"{name:{_NAME_WIDTH}}{value}" for name, value in size_lines(result)]
    return "\n".join([*about, "", *text_table(names, lines, left=1)])


def size_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is said about bytes and moves, as pairs of a name and a value."""
    single, peaks = result["single_layer_training_bytes"], result["rank_peak_memory_bytes"]
    lines = [
        ("tables in training", f"{_size(result['training_bytes'], single)}"),
        ("budget", _size(result["budget_bytes"], single)),
        ("single-layer tables", f"{single:,} bytes, with the same optimizer"),
        ("peak memory of ranks", "not recorded yet" if peaks is None else _peaks(peaks)),
    ]
    if result["history"]:
        last, what = result["history"][-1], "chunks" if result["chunks"] else "rows"
        lines.append(
            (f"{what} moved", f"{last['moves']:,} up to step {last['step']:,}; a pass every {result['interval']:,}")
        )
    return lines


def _size(size: int, single: int) -> str:
    return f"{size:,} bytes, {size / single:.1%} of single-layer tables"


def _peaks(peaks: list[int]) -> str:
    each = f"{min(peaks):,} to {max(peaks):,} each, " if len(peaks) > 1 else ""
    return f"{each}{sum(peaks):,} bytes in all: of tensors on CUDA, of processes with all libraries on CPUs"


def _cells(shares: list[dict[str, Any]], widths: list[int], what: str = "rows") -> list[str]:
    found = {each["width"]: each[what] for each in shares}
    return [f"{found[width]:.1%}" if width in found else "-" for width in widths]
