"""Render spectra as a text table."""

from typing import Any

from mlet_dist.formatting import text_table

NOTE = (
    "Low rank is a diagnostic, not a goal: singular values show how a table uses its columns, not how well the model "
    "predicts. Train the smaller table and compare before you serve it."
)


def report(result: dict[str, Any]) -> str:
    """Return the text that the command prints: a table with a line per embedding table, and notes."""
    names, lines = summary(result)
    gain = result["recipe_gain"]
    return "\n".join(
        [
            *text_table(names, lines, left=1),
            "",
            weighting(result),
            *([] if gain is None else [f"kσ² of the recipe: {gain:.4g}"]),
            NOTE,
        ]
    )


def summary(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row of cells per table."""
    names = ["table", "n", "k", "d", ">0.1", ">0.01", ">0.001", "eff. rank", "stable rank", "90%", "99%"]
    names += ["weighted eff. rank", "90%", "99%", "d for loss 0.1", "loss", "weighted loss", "gains", "balance"]
    rows = []
    for each in result["tables"]:
        plain, weighted, suggested = each["plain"], each["weighted"], each["suggested"]
        weighted_cells = (
            ["-"] * 3 if weighted is None else [short(weighted["effective_rank"]), *weighted["energy_dims"].values()]
        )
        rows.append(
            [
                each["name"],
                f"{each['num_embeddings']:,}",
                width_of(each) or "-",
                each["embedding_dim"],
                *plain["counts"].values(),
                short(plain["effective_rank"]),
                short(plain["stable_rank"]),
                *plain["energy_dims"].values(),
                *weighted_cells,
                suggested["embedding_dim"],
                short(suggested["loss"]),
                "-" if suggested["weighted_loss"] is None else short(suggested["weighted_loss"]),
                "-" if each["gains"] is None else f"{short(each['gains']['min'])}..{short(each['gains']['max'])}",
                "-" if each["balance"] is None else short(each["balance"]["relative"]),
            ]
        )
    return names, [[str(cell) for cell in row] for row in rows]


def width_of(table: dict[str, Any]) -> str:
    """Return k, or the widths of a table's ranges of rows, such as 64/16/0; empty for a single layer."""
    if "row_ranges" in table:
        return "/".join(str(each["hidden_dim"]) for each in table["row_ranges"])
    return str(table["hidden_dim"] or "")


def weighting(result: dict[str, Any]) -> str:
    """Return a sentence on how rows were weighted."""
    if result["data"] is None:
        return f"Rows are not weighted by their frequency: {result['not_weighted']}."
    return f"Weighted numbers count each row as often as it occurs in the training split of {result['data']}."


def short(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:.3g}"
