"""`mlet plan`: what it prints, what it refuses, and plan.json of a run."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlet_dist.cli import main
from mlet_dist.planner.command import _ranges
from mlet_dist.planner.hardware import presets
from tests.command import ROOT, error_line, mlet
from tests.conftest import TrainedRun
from tests.test_cli import watch_imports

CONFIG = ROOT / "configs" / "criteo_kaggle_adagrad.yaml"
# The sizes of Criteo-1TB, to a few rows: 26 tables, 180 million rows.
ROWS = (
    45_000_000, 36_000, 17_000, 7_400, 20_000, 3, 7_100, 1_500, 63, 38_000_000, 2_900_000, 400_000, 10, 2_200, 12_000,
    155, 4, 970, 14, 40_000_000, 16_000_000, 37_000_000, 580_000, 12_900, 108, 36,
)  # fmt: skip
LARGE = ("model.hidden_dim=256", "model.embedding_dim=32", "data.batch_size=65536")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text("".join(f"C{index}: {rows}\n" for index, rows in enumerate(ROWS, 1)))
    return path


def _plan(capsys: pytest.CaptureFixture[str], tables: Path, *arguments: str) -> dict[str, Any]:
    assert main(["plan", str(CONFIG), "--tables", str(tables), *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_criteo_1tb_on_64_gpus(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, tables, "--world-size", "64", *LARGE)
    assert sum(each["count"] for each in plan["ranks"]) == 64
    fullest = plan["ranks"][0]
    blocks = [-(-rows // 64) if -(-rows // 64) * 63 < rows else rows for rows in ROWS]
    assert fullest["weights"] == sum(blocks) * 256 * 4
    assert fullest["total"] == sum(fullest[kind] for kind in ("weights", "optimizer", "buffers", "dense"))
    single, spread, wide, naive, here = plan["configurations"]
    assert [each["name"] for each in plan["configurations"]] == [
        "single layer d = 32, TorchRec's row_wise",
        "single layer d = 32, auto",
        "single layer d = 256, TorchRec's row_wise",
        "MLET k = 256, after the exchange",
        "MLET k = 256, auto",
    ]
    assert spread["sent_bytes"] <= here["sent_bytes"] < single["sent_bytes"] < wide["sent_bytes"]
    # The formulas alone and TorchRec's plan agree on the fullest rank.
    assert here["memory"] == pytest.approx(fullest["total"], rel=0.01)
    assert naive["bound"] == "network"
    assert here["step_s"] == pytest.approx(here["network_s"] + here["memory_s"] + here["compute_s"])
    kinds = {each["table"]: (each["sharding_type"], each["exchange"]) for each in plan["tables"]}
    assert kinds["C1"] == ("row_wise", "unique_rows")
    assert kinds["C6"] == ("data_parallel", None)


def test_tables_as_text_and_as_a_picture(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.html"
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "16", *LARGE, "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("16 ranks of h100, 8 a node, global batch 65,536; 68 GB of 80 GB a rank are for the model\n")
    assert "\nranks  tables " in text
    assert "\nMLET k = 256, auto " in text
    page = out.read_text()
    assert not re.search(r"(?:src|href)=|url\(|<script|@import", page)
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    bars = svg.findall("{http://www.w3.org/2000/svg}rect")
    assert len([bar for bar in bars if len(bar)]) >= 4  # weights, optimizer, buffers and dense, with their bytes


def test_sizes_of_the_data_set(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(CONFIG), f"data.path={small_data}", "--world-size", "2", "--local-world-size", "2"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["tables"]) == 26


def test_a_longer_bag_sends_more(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = _plan(capsys, tables, "--world-size", "8", *LARGE)
    tables.write_text(tables.read_text().replace("C1: 45000000", "C1: {num_embeddings: 45000000, pooling_factor: 20}"))
    long = _plan(capsys, tables, "--world-size", "8", *LARGE)
    assert long["configurations"][-1]["sent_bytes"] > short["configurations"][-1]["sent_bytes"]
    exchanges = {each["table"]: each["exchange"] for each in long["tables"]}
    assert (exchanges["C1"], exchanges["C20"]) == ("reduce_scatter", "unique_rows")


def test_a_plan_that_does_not_fit_says_what_would(tables: Path) -> None:
    command = ["plan", CONFIG, "--tables", tables, "--world-size", 8, "--device", "a100-40", *LARGE]
    line = error_line(*command)
    assert re.search(
        r"the tables do not fit 8 ranks on cuda: rank \d needs [\d.]+ GB of the 34 GB that are left of 40 GB, "
        r"[\d.]+ GB short; the largest there is table 'C1': 5,625,000 rows of 256, 11\.[56] GB; what fits: ",
        line,
    )
    ways = dict(re.findall(r"\(\d\) (\S+ ?\d*): ([\d.]+) GB of 34 GB a rank", line))
    assert next(iter(ways)) == "optimizer.name=rowwise_adagrad"
    assert len(ways) == 3
    # What it proposes is true.
    smaller = next(way for way in ways if way.startswith("model.hidden_dim="))
    mlet(*command, smaller)
    mlet(*command, "optimizer.name=rowwise_adagrad")


MISTAKES = {
    "preset": (
        ["--device", "h1000"],
        "--device h1000: no such preset; there are a100-40, a100-80, h100, h200, b200, cpu",
    ),
    "nodes": (["--world-size", "12"], "--world-size 12 is not a multiple of --local-world-size 8"),
    "batch": (["--world-size", "24"], "data.batch_size 128 is not a multiple of the 24 ranks"),
    "table": (["data.sparse_features=[C1,X9]"], "data.sparse_features: "),
    "no file": (["--tables", "no.yaml"], "no.yaml: cannot read the tables: No such file or directory"),
    "no hardware": (["--device", "no.yaml"], "no.yaml: cannot read the hardware: No such file or directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_before_torch_is_imported(mistake: str, tables: Path) -> None:
    arguments, message = MISTAKES[mistake]
    out, err = watch_imports("plan", CONFIG, "--tables", tables, "--world-size", 8, *arguments)
    assert out == ["2 False"]
    assert len(err) == 1
    assert err[0].startswith(f"mlet: error: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("C1: many", "table 'C1': num_embeddings is 'many', it must be a whole number from 1 to 2147483647"),
        ("C1: {rows: 3}", "table 'C1': expected num_embeddings and pooling_factor, found rows"),
        ("C1: {num_embeddings: 3, pooling_factor: 0}", "table 'C1': pooling_factor is 0, it must be a number above 0"),
        ("- C1", "expected a line a table, such as `C1: 45000000`"),
    ],
)
def test_a_wrong_line_of_the_tables(line: str, message: str, tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.write_text(line)
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8"]) == 2
    assert capsys.readouterr().err == f"mlet: error: {tables}: {message}\n"


def test_hardware_of_ones_own(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    entry = "kind: cuda, memory_gb: 64, memory_bandwidth_gbs: 1000, fp32_tflops: 10, node_gbs: 100"
    own.write_text(f"mine: {{{entry}, network_gbs: 10}}")
    plan = _plan(capsys, tables, "--world-size", "16", "--device", str(own), *LARGE)
    assert (plan["device"]["name"], plan["device"]["memory"]) == ("mine", 64e9)
    own.write_text(f"mine: {{{entry}}}")
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "--device", str(own)]) == 2
    assert "mine: expected the keys kind, memory_gb" in capsys.readouterr().err


def test_presets_are_in_order_of_their_numbers() -> None:
    found = presets()
    assert list(found) == ["a100-40", "a100-80", "h100", "h200", "b200", "cpu"]
    assert found["h100"]["memory_bandwidth"] == 3.35e12
    for device in found.values():
        assert device["node_bandwidth"] > device["network_bandwidth"]


def test_ranges_of_ranks() -> None:
    assert _ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.e2e
def test_a_run_keeps_its_plan(trained: TrainedRun) -> None:
    plan = json.loads((trained.path / "plan.json").read_text())
    sizes = {
        each["name"]: each["num_embeddings"] for each in json.loads((trained.path / "model.json").read_text())["sparse"]
    }
    assert plan["world_size"] == 2
    assert {each["table"] for each in plan["tables"]} == set(sizes)
    for each in plan["tables"]:
        total = sum(each["rows_per_rank"])
        assert len(each["rows_per_rank"]) == 2
        if each["sharding_type"] == "row_wise":
            assert total == sizes[each["table"]]
            assert "bytes a bag" in each["reason"]
        else:
            assert total == 2 * sizes[each["table"]]
            assert each["exchange"] is None
