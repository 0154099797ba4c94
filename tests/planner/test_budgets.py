"""What `mlet plan` says of compressed tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.cli import main
from mlet_dist.embeddings.planning.dense_cost import PROCESS_BYTES
from tests.helpers.mlet_command import ROOT

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.fixture
def command(small_model: tuple[str, ...], tmp_path: Path) -> list[str]:
    settings = (*small_model, "compression.policy=static", "optimizer.name=adagrad", f"run.dir={tmp_path}")
    return ["plan", str(CONFIG), *settings, "--world-size", "2", "--device", "cpu"]


def _json(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_says_what_budgets_keep(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = _json(capsys, [*command, "compression.budget=0.7"])
    assert plan["configurations"][-1]["name"] == "compressed to 70% of the single layer's bytes"
    report = plan["compression"]
    entry_keys = [
        "budget", "budget_bytes", "training_bytes", "kept_rows", "kept_lookups", "wide_lookups", "widths",
    ]  # fmt: skip
    assert list(report) == ["single_layer_training_bytes", *entry_keys, "budgets", "summary"]
    assert [each["budget"] for each in report["budgets"]] == [1.0, 0.5, 0.25, 0.1, 0.05]
    single = report["single_layer_training_bytes"]
    whole = [each for each in (report, *report["budgets"]) if each["training_bytes"] is not None]
    assert len(whole) >= 4
    assert report["training_bytes"] <= 0.7 * single
    for each in sorted(whole, key=lambda entry: entry["budget"]):
        assert each["training_bytes"] <= each["budget_bytes"] == int(each["budget"] * single)
        assert sum(width["rows"] for width in each["widths"]) == pytest.approx(1)
        assert sum(width["lookups"] for width in each["widths"]) == pytest.approx(1)
        assert 0 < each["wide_lookups"] <= each["kept_lookups"] <= 1 + 1e-9
    by_budget = [each["kept_lookups"] for each in sorted(whole, key=lambda entry: entry["budget"])]
    assert by_budget == sorted(by_budget)
    assert report["summary"][0].startswith(f"compression  {report['training_bytes']:,} bytes in training, ")


def test_the_text_has_a_line_for_each_budget(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plain = [each for each in command if not each.startswith("compression")]
    assert "compression" not in _json(capsys, plain)
    assert main([*command, "compression.budget=20KB", "compression.tables.C3.min_width=4"]) == 0
    text = capsys.readouterr().out
    assert "\ncompression  " in text
    _, _, table = text.partition("\nwhat a budget keeps")
    lines = table.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["100%", "50%", "34%", "25%", "10%", "5%"]
    assert re.fullmatch(r" +34% +0\.0(19|20)( +\d+\.\d%){4}", lines[2])
    assert re.fullmatch(r" +5% +too small( +-){4}", lines[-1])
    assert main([*command, "compression.budget=10%"]) == 0  # a share of which the bytes are rounded
    lines = capsys.readouterr().out.partition("\nwhat a budget keeps")[2].splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["100%", "50%", "25%", "10%", "5%"]


def test_a_smaller_budget_is_suggested_and_its_widths_are_chosen_anew(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    device = tmp_path / "device.yaml"
    # 0.85 MB for the model, besides what a process takes of the usable 85%.
    memory = 0.001 + PROCESS_BYTES / 0.85e9
    device.write_text(
        f"small: {{kind: cpu, memory_gb: {memory}, memory_bandwidth_gbs: 100, fp32_tflops: 1, node_gbs: 10, "
        "network_gbs: 10}"
    )
    large = [*command[:-1], str(device), "model.hidden_dim=256", "compression.budget=60", "data.batch_size=4"]
    assert main(large) == 2
    message = capsys.readouterr().err
    found = re.search(r"\(\d\) compression\.budget=([\d.]+): ([\d.]+) GB of 0\.0858 GB per rank", message)
    assert found is not None, message
    assert not re.search(r"hidden_dim=|rows_dtype=", message)
    plan = _json(capsys, [*large, f"compression.budget={found[1]}"])
    assert f"{plan['ranks'][0]['total'] / 1e9:.3g}" == found[2]
