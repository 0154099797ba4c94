"""docs/results_full.md says what `mlet plan` says of the full public data sets, and what follows from that."""

import json
import math
import re
from pathlib import Path

import pytest

from mlet_dist.cli import main
from mlet_dist.config.config_file import load_config
from mlet_dist.sweep.arms import arms_of
from mlet_dist.sweep.sweep_file import load_sweep
from tests.helpers.mlet_command import ROOT

PAGE = (ROOT / "docs" / "results_full.md").read_text(encoding="utf-8")
SWEEP = ROOT / "configs" / "sweeps" / "smaller_tables.yaml"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| \w+ \| \w+ \| \d+ \|", line)]
# The rows of the training splits, with which the page's steps are computed.
TRAINING_ROWS = {"criteo_kaggle_adagrad": 36_672_493, "criteo_1tb": 4_195_197_692, "avazu": 32_343_173}
(STEPS,) = ([int(each.replace(",", "")) for each in re.findall(r", ([\d,]{6,})", line)]
            for line in PAGE.splitlines() if "steps an epoch |" in line)  # fmt: skip
EPOCH = dict(zip(TRAINING_ROWS, STEPS, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_the_page_says_what_mlet_plan_says(row: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config, sizes, gpus, step, bound, memory, hours = row
    files = ["plan", f"configs/{config}.yaml", "--tables", f"configs/table_sizes/{sizes}.yaml"]
    files = [str(ROOT / each) if each.startswith("configs/") else each for each in files]
    assert main([*files, "--world-size", gpus, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    predicted = plan["predicted_step_ms"]
    assert f"{predicted['total']:.3g}" == step
    assert f"{predicted['lower_bound']:.3g}" == bound
    assert f"{plan['configurations'][-1]['memory'] / 1e9:.1f}" == memory
    assert float(hours) == pytest.approx(EPOCH[config] * float(step) / 3.6e6, rel=0.04)


@pytest.mark.parametrize("config", TRAINING_ROWS)
def test_the_steps_of_an_epoch_are_those_of_the_config(config: str) -> None:
    batch = load_config(ROOT / "configs" / f"{config}.yaml").data.batch_size
    assert EPOCH[config] == math.floor(TRAINING_ROWS[config] / batch) + (TRAINING_ROWS[config] % batch > 0)
    text = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8")
    assert config == "criteo_kaggle_adagrad" or f"{EPOCH[config]:,} steps" in text
    commands = re.findall(r"torchx run .*?(?=\n\n|```)", PAGE, re.DOTALL)
    (command,) = [each for each in commands if f"tune.steps={EPOCH[config] // 9 * 3}" in each]
    assert f"tune.first_steps={EPOCH[config] // 9} " in command


def test_the_arms_of_the_sweep_are_those_that_the_page_counts(small_data: Path) -> None:
    arms = arms_of(load_sweep(SWEEP, [f"settings.data.path={small_data}"]))
    assert len(arms) == 10
    assert sum(arm.control_of is None for arm in arms) == 8
    assert "has 10 arms: 5 named ones, 3 single layers, and 2 controls" in PAGE


def test_the_hours_follow_from_steps() -> None:
    worked = re.search(r"\(8 × (\d+) × ([\d,]+) \+ 10 × 5 × ([\d,]+)\) × ([\d.]+) × 1 / 3,600,000 = ([\d.]+)", PAGE)
    assert worked is not None
    trials, tuned, epoch, step, hours = (float(each.replace(",", "")) for each in worked.groups())
    assert f"{(8 * trials * tuned + 50 * epoch) * step / 3.6e6:.1f}" == f"{hours}"
    steps = {(row[0], row[2]): float(row[3]) for row in ROWS}
    for name, config, trials, gpus in (
        ("Criteo-Kaggle", "criteo_kaggle_adagrad", 8, 1),
        ("Avazu", "avazu", 8, 1),
        ("Criteo-1TB", "criteo_1tb", 16, 1),
        ("Criteo-1TB, all values", "criteo_1tb", 16, 8),
    ):
        found = re.search(rf"^\| {name}, {trials} trials.*? \| (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
        assert found is not None, name
        tuned, epoch = EPOCH[config] // 9 * 3, EPOCH[config]
        hours = (8 * trials * tuned + 50 * epoch) * steps[config, f"{gpus}"] * gpus / 3.6e6
        assert (round(hours), round(3 * hours)) == tuple(map(int, found.groups())), name
