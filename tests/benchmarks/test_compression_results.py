"""The grid of benchmarks/compression_grid.py: how rates are chosen, what its tables show, and that it resumes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compression_results import at_chosen_rates, chosen_rates, served_table, training_table
from tests.helpers.mlet_command import ROOT, run_command

LABELS = {"single": "single layer", "graded": "graded"}


def _run(arm: str, budget: float | None, rate: float, seed: int, valid: float, test: float) -> dict[str, Any]:
    served = {f"plain/{bits}": [1024 * bits // 32 * (budget or 1), 0.7, test + 0.01] for bits in (32, 8, 4)}
    found = {"arm": arm, "budget": budget, "rate": rate, "seed": seed, "valid_logloss": valid, "test_logloss": test}
    return found | {"training_share": budget or 1.0, "served": served}


RECORDS = [
    # The first seed prefers 0.08, but the mean of both seeds 0.04.
    _run("single", None, 0.04, 0, 0.50, 0.50),
    _run("single", None, 0.08, 0, 0.49, 0.40),
    _run("single", None, 0.04, 1, 0.50, 0.52),
    _run("single", None, 0.08, 1, 0.53, 0.40),
    # The best rate of seed 0 alone; what other seeds did at one rate does not count.
    _run("graded", 0.25, 0.04, 0, 0.50, 0.90),
    _run("graded", 0.25, 0.08, 0, 0.48, 0.51),
    _run("graded", 0.25, 0.08, 1, 0.90, 0.55),
    {"arm": "graded", "budget": 0.05, "rate": 0.02, "seed": 0, "error": "too few bytes"},
]


def test_the_rate_is_the_best_on_validation_data_of_the_seeds_that_all_rates_ran() -> None:
    assert chosen_rates(RECORDS) == {("single", None): 0.04, ("graded", 0.25): 0.08}
    cells = at_chosen_rates(RECORDS)
    assert {cell: sorted(runs) for cell, runs in cells.items()} == {("single", None): [0, 1], ("graded", 0.25): [0, 1]}


def test_tables_show_paired_differences() -> None:
    lines = training_table(RECORDS, LABELS, "test_logloss").splitlines()
    assert lines[0] == "test_logloss of the single layer: 0.5100 ± 0.0141 (2)"
    assert "| graded | +0.0200 ± 0.0141 (2), 0.08 |" in lines  # 0.51 - 0.50 and 0.55 - 0.52
    assert "| single layer | 100% | +0.0000 ± 0.0000 (2), 0.04 |" in lines
    (row,) = (line for line in served_table(RECORDS, LABELS).splitlines() if line.startswith("| graded"))
    assert row.startswith("| graded | 25% | plain | 4.0x +0.0300 ± 0.0141 (2) | 16.0x ")


@pytest.mark.e2e
def test_a_grid_does_not_repeat_what_its_file_has(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    arms = ["--arms", "single", "chunks", "--budgets", 0.3, 0.1, "--out", out]
    command = [sys.executable, ROOT / "benchmarks" / "compression_grid.py", "--drift", "--drift-rows", 1500, *arms]
    first = run_command([*command, "--seeds", 1])
    before = out.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    assert sum("error" in each for each in records) == 1  # chunks cannot be as small as 10%, which one run shows
    assert len({(each["arm"], each["budget"], each["rate"], each["seed"]) for each in records}) == len(records)
    assert [each["rate"] for each in records[:3]] == [0.02, 0.04, 0.08]
    again = run_command([*command, "--seeds", 1])
    assert out.read_text() == before
    assert again.stdout == first.stdout[first.stdout.index("\ntest_logloss") :]
    run_command([*command, "--seeds", 2])
    added = [json.loads(line) for line in out.read_text()[len(before) :].splitlines()]
    rates = chosen_rates(records)
    expected = [("single", None, 1, rates["single", None]), ("chunks", 0.3, 1, rates["chunks", 0.3])]
    assert [(each["arm"], each["budget"], each["seed"], each["rate"]) for each in added] == expected
