"""Spectra in words: what `mlet spectrum` prints, and the table of its page."""

from typing import Any

from mlet_dist.formatting import text_table

NOTE = (
    "Low rank is a diagnostic, not a goal: singular values say how a table uses its columns, not how well the model "
    "predicts. Train the smaller table and compare before you serve it."
)


def report(result: dict[str, Any]) -> str:
    """What the command prints: a line a table."""
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
    """Names of columns, and a row of texts a table."""
    names = ["table", "n", "k", "d", ">0.1", ">0.01", ">0.001", "eff. rank", "stable rank", "90%", "99%"]
    names += ["seen: eff. rank", "90%", "99%", "d for 0.1", "loss", "seen: loss", "balance"]
    rows = []
    for each in result["tables"]:
        plain, weighted, smaller = each["plain"], each["weighted"], each["suggested"]
        seen = (
            ["-"] * 3 if weighted is None else [_short(weighted["effective_rank"]), *weighted["energy_dims"].values()]
        )
        rows.append(
            [
                each["name"],
                f"{each['num_embeddings']:,}",
                each["hidden_dim"] or "-",
                each["embedding_dim"],
                *plain["counts"].values(),
                _short(plain["effective_rank"]),
                _short(plain["stable_rank"]),
                *plain["energy_dims"].values(),
                *seen,
                smaller["embedding_dim"],
                _short(smaller["loss"]),
                "-" if smaller["weighted_loss"] is None else _short(smaller["weighted_loss"]),
                "-" if each["balance"] is None else _short(each["balance"]["relative"]),
            ]
        )
    return names, [[str(cell) for cell in row] for row in rows]


def weighting(result: dict[str, Any]) -> str:
    """How rows were weighted, a sentence."""
    if result["data"] is None:
        return f"Not weighted by how often rows are seen: {result['not_weighted']}."
    return f"Weighted ('seen') by how often the training split of {result['data']} has each row."


def _short(value: float) -> str:
    return f"{value:.3g}"
