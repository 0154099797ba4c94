"""Tests of `mlet plan`: its output, its errors, and plan.json of a run."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlet_dist.cli import main
from mlet_dist.embeddings.planning.cost_model import Step, StepTime
from mlet_dist.embeddings.planning.dense_cost import PROCESS_BYTES
from mlet_dist.planner import run_plan
from mlet_dist.planner.plan_inputs import presets
from mlet_dist.planner.run_plan import _ranges
from tests.cli.test_cli import watch_imports
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT, error_line

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


def test_keys_of_the_json_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "slowest_step", lambda *_: (Step(*range(1, 11)), StepTime(1, 2, 3, 4)))
    small = tmp_path / "tables.yaml"
    small.write_text("C1: 1000\n")
    plan = _plan(capsys, small, "--world-size", "2", "--local-world-size", "1", "data.batch_size=64")
    assert list(plan) == [
        "world_size", "local_world_size", "batch_size", "device", "shortage", "summary", "ranks", "configurations",
        "checkpoint_copy", "predicted_step_ms", "busiest_owner", "collectives", "tables", "rates",
    ]  # fmt: skip
    assert list(plan["device"]) == [
        "name", "kind", "memory", "memory_bandwidth", "flops", "node_bandwidth", "network_bandwidth", "host_memory",
        "host_bandwidth", "collectives", "launch", "host_step", "host_table", "ids", "reduce_rate", "at_peak",
        "usable_memory",
    ]  # fmt: skip
    assert list(plan["ranks"][0]) == [
        "ranks", "count", "tables", "rows", "weights", "optimizer", "buffers", "dense", "process", "host", "total",
    ]  # fmt: skip
    step = {
        "vector_bytes": 1, "index_bytes": 2, "weight_bytes": 3, "node_held": 4, "node_home": 5, "network_held": 6,
        "network_home": 7, "memory_bytes": 8, "host_bytes": 9, "flops": 10,
    }  # fmt: skip
    configuration = plan["configurations"][-1]
    assert list(configuration) == [
        "name", "memory", "host_memory", "fits", *step, "sent_bytes", "network_s", "memory_s", "host_s", "compute_s",
        "latency_s", "host_floor_s", "skew_s", "step_s", "bound",
    ]  # fmt: skip
    assert {key: configuration[key] for key in step} == step
    assert list(plan["collectives"][0]) == ["collective", "scope", "ranks", "nodes", "count", "latency_ms"]
    assert list(plan["tables"][0]) == [
        "table", "sharding_type", "compute_kernel", "exchange", "reason", "exchange_reason", "rows_per_rank",
    ]  # fmt: skip


def test_criteo_1tb_on_64_gpus(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, tables, "--world-size", "64", *LARGE)
    assert sum(each["count"] for each in plan["ranks"]) == 64
    fullest = plan["ranks"][0]
    types = {each["table"]: each["sharding_type"] for each in plan["tables"]}
    assert set(types.values()) == {"row_wise", "data_parallel"}
    blocks = [rows if types[f"C{index}"] == "data_parallel" else -(-rows // 64) for index, rows in enumerate(ROWS, 1)]
    assert fullest["weights"] == sum(blocks) * 256 * 4
    assert fullest["total"] == sum(fullest[kind] for kind in ("weights", "optimizer", "buffers", "dense"))
    single, spread, wide, naive, here = plan["configurations"]
    assert [each["name"] for each in plan["configurations"]] == [
        "single layer d = 32, TorchRec's exchange",
        "single layer d = 32, auto",
        "single layer d = 256, TorchRec's exchange",
        "MLET k = 256, after the exchange",
        "MLET k = 256, auto",
    ]
    assert spread["sent_bytes"] <= here["sent_bytes"] < single["sent_bytes"] < wide["sent_bytes"]
    assert here["memory"] == fullest["total"]
    assert naive["network_s"] > max(naive["memory_s"], naive["compute_s"], naive["latency_s"])
    # What MLET is compared with has a plan of its own: the one that `sharding.exchange=after` gives.
    composed = _plan(capsys, tables, "--world-size", "64", *LARGE, "sharding.exchange=after")
    assert naive["step_s"] == composed["configurations"][-1]["step_s"]
    assert "row_wise" not in {each["sharding_type"] for each in composed["tables"]}
    alone = _plan(capsys, tables, "--world-size", "64", *LARGE, "sharding.exchange=after", "model.hidden_dim=null")
    assert single["step_s"] == alone["configurations"][-1]["step_s"]
    parts = ("network_s", "memory_s", "host_s", "compute_s", "latency_s", "host_floor_s", "skew_s")
    assert here["step_s"] == pytest.approx(sum(here[part] for part in parts))
    tables_of = {each["table"]: each for each in plan["tables"]}
    assert (tables_of["C1"]["sharding_type"], tables_of["C1"]["exchange"]) == ("row_wise", "unique_rows")
    assert tables_of["C1"]["rows_per_rank"] == [[0, 63, 703_125]]
    assert re.fullmatch(
        r"under 0.01 ms a step on each of 64 ranks; table_\w+ [\d.]+ ms a step on (one rank|each of 8 ranks) "
        r"and [\d.]+ ms for its own collectives",
        tables_of["C1"]["reason"],
    )
    assert (tables_of["C6"]["sharding_type"], tables_of["C6"]["exchange"]) == ("data_parallel", None)
    assert len(plan["summary"]) <= 4


def test_a_plan_as_text_and_as_an_html_page(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.html"
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "16", *LARGE, "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "16 ranks of h100, 8 per node, global batch 65,536; 68 GB of 80 GB per rank are for the model\n"
    )
    assert "\nranks  tables " in text
    assert "\nMLET k = 256, auto " in text
    page = out.read_text()
    assert not re.search(r"(?:src|href)=\"(?!#)|url\(|<script|@import", page)
    for kind in ("weights", "optimizer", "buffers", "dense"):
        assert re.search(rf"<title>{kind}: [\d.]+ [GM]B</title>", page), kind
    for cell in ("MLET k = 256, auto", "predicted step", "collectives"):
        assert re.search(rf">{re.escape(cell)}[^<]*</(td|dt)>", page), cell
    assert "<pre>" not in page


def test_sizes_of_the_data_set(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(CONFIG), f"data.path={small_data}", "--world-size", "2", "--local-world-size", "2"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["tables"]) == 26
    fullest = plan["ranks"][0]
    kinds = ("weights", "optimizer", "buffers", "dense", "process")
    assert fullest["total"] == pytest.approx(sum(fullest[kind] for kind in kinds))
    assert fullest["process"] >= PROCESS_BYTES
    assert plan["configurations"][-1]["memory"] == fullest["total"]


def test_a_longer_bag_sends_more(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = _plan(capsys, tables, "--world-size", "8", *LARGE)
    tables.write_text(tables.read_text().replace("C1: 45000000", "C1: {num_embeddings: 45000000, pooling_factor: 20}"))
    long = _plan(capsys, tables, "--world-size", "8", *LARGE)
    assert long["configurations"][-1]["sent_bytes"] > short["configurations"][-1]["sent_bytes"]
    exchanges = {each["table"]: each["exchange"] for each in long["tables"]}
    assert (exchanges["C1"], exchanges["C20"]) == ("reduce_scatter", "unique_rows")


def test_a_plan_that_does_not_fit_suggests_settings_that_fit(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--tables", tables, "--world-size", "8", "--device", "a100-40", *LARGE]
    line = error_line("plan", CONFIG, *command)
    assert re.search(
        r"the tables do not fit 8 ranks on cuda: rank \d needs [\d.]+ GB, but only 34 GB of 40 GB are usable, "
        r"[\d.]+ GB short; its largest table is 'C1': 5,625,000 rows of 256 columns, 11\.[56] GB; what fits: ",
        line,
    )
    suggested = dict(re.findall(r"\(\d\) (\S+ ?\d*): ([\d.]+) GB of 34 GB per rank", line))
    assert list(suggested)[:2] == [
        "optimizer.name=rowwise_adagrad",
        "sharding.compute_kernels=[fused,fused_uvm_caching]",
    ]
    assert len(suggested) == 3
    assert "per rank and 21.8 GB of host memory, " in line
    # The suggestions are true.
    for setting, needed in suggested.items():
        plan = _plan(capsys, *command[1:], setting)
        assert f"{plan['ranks'][0]['total'] / 1e9:.3g}" == needed


def test_the_first_suggestion_lifts_the_limits_on_sharding_types(tables: Path) -> None:
    limits = ["sharding.sharding_types=[data_parallel]", "sharding.tables.C1.sharding_types=[table_wise]"]
    line = error_line("plan", CONFIG, "--tables", tables, "--world-size", "8", *LARGE, *limits)
    assert "; what fits: (1) sharding.sharding_types=null sharding.tables.C1.sharding_types=null: " in line


def test_a_plan_that_does_not_fit_is_written_as_a_page(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.html"
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "--device", "a100-40", *LARGE]
    assert main([*command, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mlet: error: the tables do not fit 8 ranks on cuda: ")
    page = out.read_text()
    assert "does not fit: the tables do not fit 8 ranks" in page
    (limit, _), bars = _limits_and_bars(page)
    assert max(bars) > limit


def _limits_and_bars(page: str) -> tuple[list[float], list[float]]:
    """Return the places of the upright lines of the chart, and of the right ends of its bars."""
    svg = ElementTree.fromstring(re.sub(r' href="[^"]*"', "", page[page.index("<svg") : page.index("</svg>") + 6]))
    lines, bars = [], []
    for path in svg.iter("path"):
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
        style = path.attrib.get("style", "")
        if "stroke-dasharray" in style:
            lines.append(numbers[0])
        elif any(f"fill: var(--s{index})" in style for index in range(4)):
            bars.append(max(numbers[::2]))
    return sorted(lines), bars


def test_rows_on_the_host(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = "sharding.tables.C1.compute_kernels=[fused_uvm_caching]"
    arguments = [tables, "--world-size", "8", *LARGE, kernels]
    plan = _plan(capsys, *arguments)
    assert [each["table"] for each in plan["tables"] if each["compute_kernel"] == "fused_uvm_caching"] == ["C1"]
    rows, row = 5_625_000, 256 * 4
    assert plan["ranks"][0]["host"] == 2 * rows * row
    assert any("C1 (45,000,000 rows)" in line and "fused_uvm_caching" in line for line in plan["summary"])
    smaller = _plan(capsys, *arguments, "sharding.cache_load_factor=0.1")
    freed = plan["ranks"][0]["weights"] - smaller["ranks"][0]["weights"]
    assert freed == pytest.approx(0.1 * rows * (row + 16), rel=1e-4)
    assert smaller["configurations"][-1]["host_s"] > plan["configurations"][-1]["host_s"]


def test_settings_of_single_tables(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(
        capsys,
        tables,
        "--world-size",
        "16",
        *LARGE,
        "sharding.tables={C2: {sharding_types: [table_wise]}, C3: {sharding_types: [table_row_wise]}}",
        "sharding.tables.C4.exchange=after",
        "sharding.tables.C5.rows_dtype=fp16",
        "sharding.data_parallel_up_to_mb=0",
    )
    entries = {each["table"]: each for each in plan["tables"]}
    assert (entries["C2"]["sharding_type"], entries["C2"]["exchange"]) == ("table_wise", "all_to_all")
    assert [last - first + 1 for first, last, _ in entries["C2"]["rows_per_rank"]] == [1]
    assert entries["C3"]["rows_per_rank"] in ([[0, 7, 2125]], [[8, 15, 2125]])
    assert entries["C4"]["exchange"] == "after"
    assert entries["C2"]["reason"].endswith(" a step on one rank; no other type was asked for")
    assert entries["C2"]["exchange_reason"] == "sums are projected before they cross the network"
    assert "data_parallel" not in {each["sharding_type"] for each in plan["tables"]}
    plain = _plan(capsys, tables, "--world-size", "16", *LARGE, "sharding.sharding_types=[row_wise, data_parallel]")
    half = _plan(
        capsys, tables, "--world-size", "16", *LARGE, "sharding.sharding_types=[row_wise, data_parallel]",
        "sharding.rows_dtype=fp16", "sharding.forward_comm=fp16", "sharding.backward_comm=fp16",
    )  # fmt: skip
    weights, vectors = (
        [each["configurations"][-1][key] for each in (half, plain)] for key in ("memory", "vector_bytes")
    )
    assert weights[0] < weights[1]
    assert vectors[0] == pytest.approx(vectors[1] / 2, rel=0.01)
    assert half["ranks"][0]["optimizer"] == plain["ranks"][0]["optimizer"]


def test_a_limit_of_the_config_is_given_as_the_reason(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_type = "sharding.tables={C2: {sharding_types: [table_wise]}, C3: {sharding_types: [data_parallel]}}"
    for hidden_dim, reason in (
        ("null", "sums cross the network"),
        ("64", "sums are projected before they cross the ne"),
    ):
        plan = _plan(capsys, tables, "--world-size", "8", one_type, f"model.hidden_dim={hidden_dim}")
        entries = {each["table"]: each for each in plan["tables"]}
        assert entries["C2"]["exchange_reason"].startswith(reason)
        # 17,000 rows are enough for 8 ranks.
        assert entries["C3"]["reason"].endswith(" a step on each of 8 ranks; no other type was asked for")


ERRORS = {
    "preset": (
        ["--device", "h1000"],
        "--device h1000: no such preset; use a100-40, a100-80, h100, h200, b200, cpu",
    ),
    "nodes": (
        ["--world-size", "12"],
        "--world-size 12 is not a multiple of --local-world-size 8: every node must have the same number of ranks; use "
        "--world-size 16, or --local-world-size 6",
    ),
    "large nodes": (
        ["--world-size=256", "--local-world-size=256"],
        "--local-world-size 256: torch supports at most 128 ",
    ),
    "no picture": (
        ["--out", "tables.yaml"],
        "--out tables.yaml: the plan is written as an HTML page; name a file that ends in .html",
    ),
    "batch": (["--world-size", "24"], "data.batch_size 128 is not a multiple of the 24 ranks"),
    "table": (["data.sparse_features=[C1,X9]"], "data.sparse_features: "),
    "its own table": (
        ["sharding.tables.C77.exchange=after"],
        "sharding.tables: the model has no table 'C77' (did you mean ",
    ),
    "columns": (
        ["model.hidden_dim=4096"],
        "model.hidden_dim makes rows of 4096 columns, and fbgemm's CUDA kernels support at most 2048; use 2048 or less",
    ),
    "no file": (["--tables", "no.yaml"], "no.yaml: cannot read the tables: No such file or directory"),
    "no hardware": (["--device", "no.yaml"], "no.yaml: cannot read the hardware: No such file or directory"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_one_line_before_torch_is_imported(error: str, tables: Path) -> None:
    arguments, message = ERRORS[error]
    out, err = watch_imports("plan", CONFIG, "--tables", tables, "--world-size", 8, *arguments)
    assert out == ["2 False"]
    assert len(err) == 1
    assert err[0].startswith(f"mlet: error: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("C1: many", "table 'C1': num_embeddings is 'many', it must be a whole number from 1 to 2147483647"),
        ("C1: {rows: 3}", "table 'C1': expected num_embeddings and pooling_factor, found rows"),
        (
            "C1: {num_embeddings: 3, pooling_factor: 0}",
            "table 'C1': pooling_factor is 0, it must be a number above 0, at most 2147483647",
        ),
        (
            "C1: {num_embeddings: 3, pooling_factor: 1.0e+300}",
            "table 'C1': pooling_factor is 1e+300, it must be a number above 0, at most 2147483647",
        ),
        ("C1: {1: 3}", "table 'C1': expected num_embeddings and pooling_factor, found 1"),
        ("C1: 10\nC1: 2000000", "not valid YAML in line 2: key 'C1' is given twice"),
        ("1: 10\n'1': 2000000", "table '1' is given twice"),
        ("null: 10", "table None: a table's name must be text; put it in quotes"),
        ("- C1", "expected one line for each table, such as `C1: 45000000`"),
    ],
)
def test_a_wrong_line_in_the_file_of_tables(
    line: str, message: str, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.write_text(line)
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8"]) == 2
    assert capsys.readouterr().err == f"mlet: error: {tables}: {message}\n"


def test_a_k_below_d_prints_a_warning(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "model.hidden_dim=8"]
    assert main(command) == 0
    assert capsys.readouterr().err.startswith("mlet: warning: model.hidden_dim 8 is below model.embedding_dim 16: ")


@pytest.mark.parametrize("name", ["a.b", "type", ""])
def test_a_name_that_torch_cannot_have(name: str, tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.write_text(f"{name!r}: 100")
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8"]) == 2
    assert capsys.readouterr().err.startswith(f"mlet: error: --tables: table {name!r}: no module of torch can have ")


def test_hardware_from_a_file(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    entry = "kind: cuda, memory_gb: 64, memory_bandwidth_gbs: 1000, fp32_tflops: 10, node_gbs: 100, host_memory_gb: 100"
    entry += ", host_link_gbs: 20"
    own.write_text(f"mine: {{{entry}, network_gbs: 10}}")
    plan = _plan(capsys, tables, "--world-size", "16", "--device", str(own), *LARGE)
    assert (plan["device"]["name"], plan["device"]["memory"]) == ("mine", 64e9)
    own.write_text(f"mine: {{{entry}}}")
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "--device", str(own)]) == 2
    assert "mine: expected the keys kind, memory_gb" in capsys.readouterr().err
    own.write_text(f"mine: {{{entry.replace('memory_gb: 64', 'memory_gb: 1.0e+300')}, network_gbs: 10}}")
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "--device", str(own)]) == 2
    assert "mine.memory_gb is 1e+300, it must be a number above 0, at most 1e+09" in capsys.readouterr().err


WRONG_TABLES = {
    "sharding.tables.C6.sharding_types=[row_wise]": "table 'C6' cannot be row_wise: with 3 rows, some of 8 ranks would "
    "have none; it can be table_wise, data_parallel",
    "sharding.sharding_types=[row_wise]": "table 'C6' cannot be row_wise: with 3 rows, some of 8 ranks would have ",
    "sharding.tables={C1: {exchange: unique_rows, sharding_types: [table_wise]}}": "table 'C1' cannot be table_wise: "
    "exchange 'unique_rows' does not support that; it can be row_wise, data_parallel",
}


@pytest.mark.parametrize("setting", WRONG_TABLES)
def test_a_sharding_type_that_is_impossible_for_a_table(
    setting: str, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", setting]) == 2
    assert capsys.readouterr().err.startswith(f"mlet: error: sharding: {WRONG_TABLES[setting]}")


def test_a_cpu_has_no_kernels_for_host_memory(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "8", "--device", "cpu"]
    assert main([*command, "sharding.tables.C1.compute_kernels=[fused_uvm]"]) == 2
    assert capsys.readouterr().err.startswith("mlet: error: sharding.tables.C1.compute_kernels names fused_uvm, ")


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
        total = sum((last - first + 1) * rows for first, last, rows in each["rows_per_rank"])
        copies = 2 if each["sharding_type"] == "data_parallel" else 1
        assert total == copies * sizes[each["table"]]
        assert (each["exchange"] is None) == (copies == 2)
        if each["exchange"] == "unique_rows":
            assert "bytes a bag" in each["exchange_reason"]
        assert "ms a step on " in each["reason"]
