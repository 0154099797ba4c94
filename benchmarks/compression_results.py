"""Reads the results of ``compression_grid.py``, and makes tables of differences from the single layer.

A *cell* is an arm and its budget, null for an arm that has a size of its own. Differences are taken between runs of the
same seed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Cell = tuple[str, float | None]  # arm, budget
Key = tuple[str, float | None, float, int]  # arm, budget, rate, seed
Record = dict[str, Any]

SINGLE: Cell = ("single", None)
BITS = (32, 8, 4)
PRUNED = ("count", "count_mean", "magnitude")


def read(path: Path) -> list[Record]:
    """Return the records of a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(record: Record) -> Key:
    """Return what tells a run from the others of its data set."""
    return record["arm"], record["budget"], record["rate"], record["seed"]


def chosen_rates(records: Iterable[Record]) -> dict[Cell, float]:
    """Return the best rate of each arm and budget: by validation LogLoss, the mean of the seeds that all rates ran."""
    losses: dict[Cell, dict[float, dict[int, float]]] = {}
    for each in records:
        if "error" not in each:
            cell = losses.setdefault((each["arm"], each["budget"]), {})
            cell.setdefault(each["rate"], {})[each["seed"]] = each["valid_logloss"]
    found = {}
    for cell, by_rate in losses.items():
        seeds = set.intersection(*(set(of_rate) for of_rate in by_rate.values()))
        found[cell] = min(by_rate, key=lambda rate: sum(by_rate[rate][seed] for seed in seeds))
    return found


def at_chosen_rates(records: Sequence[Record]) -> dict[Cell, dict[int, Record]]:
    """Return the runs of each arm and budget at its chosen rate, by seed."""
    rates = chosen_rates(records)
    found: dict[Cell, dict[int, Record]] = {cell: {} for cell in rates}
    for each in records:
        cell = (each["arm"], each["budget"])
        if "error" not in each and each["rate"] == rates[cell]:
            found[cell][each["seed"]] = each
    return found


def mean_and_sd(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, with the number of values where it is not 5."""
    spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else "–"
    return f"{np.mean(values):+.4f} ± {spread}" + ("" if len(values) == 5 else f" ({len(values)})")


def training_table(records: Sequence[Record], labels: Mapping[str, str], metric: str) -> str:
    """Return a Markdown table of quality at equal bytes in training: a row for each arm, a column for each budget.

    Args:
        records: of one data set.
        labels: what the table calls each arm, in its order.
        metric: the key of the records that it shows.
    """
    cells = at_chosen_rates(records)
    single = cells[SINGLE]
    budgets = sorted({budget for _, budget in cells if budget}, reverse=True)
    refused = {(each["arm"], each["budget"]) for each in records if "error" in each}

    def text(cell: Cell) -> str:
        if cell not in cells:
            return "no row fits" if cell in refused else "–"
        runs = cells[cell]
        pairs = [runs[seed][metric] - single[seed][metric] for seed in sorted(runs) if seed in single]
        return mean_and_sd(pairs) + f", {next(iter(runs.values()))['rate']:g}"

    sized = [arm for arm in labels if any(cell[0] == arm and cell[1] for cell in [*cells, *refused])]
    lines = [f"| arm | {' | '.join(f'{budget:.0%}' for budget in budgets)} |", "|---|" + "--:|" * len(budgets)]
    lines += [f"| {labels[arm]} | {' | '.join(text((arm, budget)) for budget in budgets)} |" for arm in sized]
    lines += ["", "| dense tables | bytes in training | difference, rate |", "|---|--:|--:|"]
    for arm in labels:
        if (arm, None) in cells:
            share = next(iter(cells[arm, None].values()))["training_share"]
            lines.append(f"| {labels[arm]} | {share:.0%} | {text((arm, None))} |")
    values = [single[seed][metric] for seed in sorted(single)]
    return "\n".join([f"{metric} of the single layer: {mean_and_sd(values)[1:]}", "", *lines])


def served(runs: Mapping[int, Record], single: Mapping[int, Record], form: str) -> tuple[float, list[float]] | None:
    """Return the bytes of a served form, such as ``mixed/8``, and its differences of LogLoss from the single layer.

    The single layer is served in float32. None if the runs have no such form.
    """
    found = [
        (each["served"][form], single[seed]) for seed, each in runs.items() if form in each["served"] and seed in single
    ]
    if not found:
        return None
    return found[0][0][0], [of[2] - base["test_logloss"] for of, base in found]


def served_table(records: Sequence[Record], labels: Mapping[str, str]) -> str:
    """Return a Markdown table of served forms: times smaller than the single layer in float32, and difference."""
    cells = at_chosen_rates(records)
    single = cells[SINGLE]
    whole = next(iter(single.values()))["served"]["plain/32"][0]
    shares = sorted({form.split("/")[1] for form in next(iter(single.values()))["served"] if form.count("/") == 2})
    rows = [(SINGLE, f"{form}/{share}") for form in PRUNED for share in reversed(shares)]
    for arm in labels:
        rows += [(cell, form) for cell in sorted(cells, key=str) if cell[0] == arm for form in ("plain", "mixed")]
    lines = ["| arm | budget | form | float32 | int8 | int4 |", "|---|--:|---|--:|--:|--:|"]
    for cell, form in rows:
        found = [served(cells[cell], single, f"{form}/{bits}") for bits in BITS]
        if all(found):
            texts = [f"{whole / size:.1f}x {mean_and_sd(pairs)}" for size, pairs in filter(None, found)]
            budget = f"{cell[1]:.0%}" if cell[1] else "–"
            lines.append(f"| {labels[cell[0]]} | {budget} | {form} | {' | '.join(texts)} |")
    return "\n".join(lines)
