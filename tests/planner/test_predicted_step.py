"""`mlet plan`: the predicted step, its parts, and what a calibration and a vocabulary change."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.cli import main
from mlet_dist.config.calibration_file import COLLECTIVES, GroupRates, write_calibration
from mlet_dist.data.schema import VOCABULARY, DatasetSchema
from tests.config.test_calibration_file import FOUND
from tests.helpers.mlet_command import ROOT

CONFIG = ROOT / "configs" / "criteo_kaggle_adagrad.yaml"
PARTS = ("latency", "network", "memory", "compute", "host", "skew")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text("C1: 45000000\nC2: 2000000\nC3: 60000\nC4: 300\n")
    return path


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "rates.yaml"
    write_calibration(path, FOUND)
    return path


def _plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", str(CONFIG), *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def _cpu(tables: Path, *arguments: object) -> list[object]:
    return ["--tables", tables, "--world-size", 4, "--local-world-size", 2, "--device", "cpu", *arguments]


@pytest.mark.parametrize("device", ["h100", "cpu"])
def test_the_parts_sum_to_the_total(device: str, tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "--tables", tables, "--world-size", 16, "--device", device)
    predicted = plan["predicted_step_ms"]
    assert list(predicted) == ["total", *PARTS, "lower_bound"]
    assert predicted["total"] == pytest.approx(sum(predicted[part] for part in PARTS))
    assert all(predicted[part] >= 0 for part in PARTS)
    assert 0 < predicted["lower_bound"] < predicted["total"]
    assert predicted["total"] == pytest.approx(1e3 * plan["configurations"][-1]["step_s"])
    assert sum(each["count"] for each in plan["collectives"]) == 6
    assert predicted["latency"] == pytest.approx(sum(each["latency_ms"] for each in plan["collectives"]))


def test_a_single_rank_has_no_collectives(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.write_text("C1: 1000\n")
    plan = _plan(capsys, "--tables", tables, "--world-size", 1)
    assert (plan["collectives"], plan["predicted_step_ms"]["latency"], plan["predicted_step_ms"]["network"]) == (
        [],
        0,
        0,
    )


def test_measured_rates_replace_those_of_the_device(
    tables: Path, rates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, plan = _plan(capsys, *_cpu(tables)), _plan(capsys, *_cpu(tables, "--calibration", rates))
    device, predicted = plan["device"], plan["predicted_step_ms"]
    assert (device["memory"], device["memory_bandwidth"]) == (before["device"]["memory"], 2.5e9)
    assert (device["flops"], device["host_step"], device["reduce_rate"]) == (0.05e12, 0.008, 1.0)
    assert predicted["latency"] == pytest.approx(6 * 0.10025)  # each collective of four ranks on two nodes
    assert predicted["host"] == pytest.approx(8 + 4 * 0.1205)
    assert predicted["lower_bound"] is None
    assert plan["rates"][0].startswith("rates were measured on 2026-11-30 by 4 ranks of a and 1 more over gloo")
    assert "peak rates of cpu" in before["rates"][0]


def test_an_all_reduce_has_its_own_measured_bandwidth(
    tables: Path, rates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    even = _plan(capsys, *_cpu(tables, "--calibration", rates))["predicted_step_ms"]
    groups = [
        GroupRates(each, ranks, nodes, 100.25, 0.75 if each == "all_reduce" else 1.5)
        for each in COLLECTIVES
        for ranks, nodes in ((2, 1), (4, 2))
    ]
    write_calibration(rates, dataclasses.replace(FOUND, groups=tuple(groups)))
    slow = _plan(capsys, *_cpu(tables, "--calibration", rates))["predicted_step_ms"]
    assert slow["network"] > even["network"]
    assert slow["latency"] == even["latency"]


def test_other_numbers_of_ranks_and_nodes_are_said(
    tables: Path, rates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = _plan(capsys, "--tables", tables, "--world-size", 16, "--device", "cpu", "--calibration", rates)
    assert any("latencies of 16 ranks follow from measured groups" in line for line in more["rates"])
    groups = tuple(GroupRates(each, 4, 1, 100.25, 1.5) for each in COLLECTIVES)
    write_calibration(rates, dataclasses.replace(FOUND, hosts=("a",), local_world_size=4, groups=groups))
    plan = _plan(capsys, *_cpu(tables, "--calibration", rates))
    assert any("the network between nodes was not measured" in line for line in plan["rates"])


def test_a_calibration_of_another_device_is_refused(
    tables: Path, rates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "4", "--calibration", str(rates)]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"mlet: error: --calibration {rates}: it was measured on cpu ranks, and --device h100 is of kind cuda; name a "
        "device of kind cpu\n"
    )
    assert main([*command[:-1], str(tables)]) == 2
    assert f"{tables}: not a calibration; " in capsys.readouterr().err


def test_optional_rates_of_a_hardware_file(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    entry = "kind: cuda, memory_gb: 80, memory_bandwidth_gbs: 1000, fp32_tflops: 10, node_gbs: 100, host_memory_gb: 100"
    entry += ", host_link_gbs: 20, network_gbs: 10"
    arguments = ["--tables", tables, "--world-size", 16, "--device", own]
    own.write_text(f"mine: {{{entry}, launch_us: 20}}")
    plan = _plan(capsys, *arguments)
    assert plan["device"]["host_step"] == pytest.approx(20e-6 * 340)
    own.write_text(f"mine: {{{entry}, launch_us: 0}}")
    assert main(["plan", str(CONFIG), *map(str, arguments)]) == 2
    assert "mine.launch_us is 0, it must be a number above 0" in capsys.readouterr().err


def test_counts_of_a_vocabulary_give_the_skew(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(small_data, tmp_path / "data")
    limits = ("--world-size", 4, "--device", "cpu", "sharding.data_parallel_up_to_mb=0", "data.batch_size=1024")
    even = _plan(capsys, f"data.path={data}", *limits)["ranks"][0]
    (data / VOCABULARY).mkdir()
    for name, rows in DatasetSchema.load(data).num_embeddings.items():
        counts = [3000 // (2 * row * row) for row in range(1, rows)]
        pq.write_table(pa.table({"count": pa.array(counts, pa.int64())}), data / VOCABULARY / f"{name}.parquet")
    plan = _plan(capsys, f"data.path={data}", *limits)
    skewed = plan["ranks"][0]
    assert skewed["weights"] == even["weights"]
    assert skewed["buffers"] < even["buffers"]  # a batch has fewer distinct rows
    assert plan["configurations"][-1]["memory"] == skewed["total"]
    assert plan["busiest_owner"] > 1
    assert plan["predicted_step_ms"]["skew"] > 0
    assert main(["plan", str(CONFIG), f"data.path={data}", *map(str, limits)]) == 0
    shown = capsys.readouterr().out
    assert f"the busiest owner of rows is asked {plan['busiest_owner']:.2f} times the mean" in shown
    assert "\nlower bound  " in shown


def test_without_counts_the_skew_is_said_to_be_unknown(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(CONFIG), "--tables", str(tables), "--world-size", "16"]
    assert main(command) == 0
    assert "the skew of owners is not known" in capsys.readouterr().out
    assert _plan(capsys, *command[2:])["busiest_owner"] is None


def test_the_copy_of_a_checkpoint_is_counted(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tables", tables, "--world-size", 16]
    plan = _plan(capsys, *arguments)
    fullest, copy = plan["ranks"][0], plan["checkpoint_copy"]
    assert copy["bytes_per_rank"] == fullest["weights"] + fullest["optimizer"] + fullest["dense"] + fullest["host"]
    assert (copy["bytes_per_node"], copy["fits"]) == (8 * copy["bytes_per_rank"], True)
    small = tables.with_name("small.yaml")
    entry = "kind: cuda, memory_gb: 80, memory_bandwidth_gbs: 1000, fp32_tflops: 10, node_gbs: 100, network_gbs: 10"
    small.write_text(f"small: {{{entry}, host_memory_gb: 0.3, host_link_gbs: 20}}")
    assert not _plan(capsys, *arguments, "--device", small)["checkpoint_copy"]["fits"]
    assert main(["plan", str(CONFIG), *map(str, arguments), "--device", str(small)]) == 0
    assert "more than the 0.3 GB of host memory a rank allow" in capsys.readouterr().out
