"""Every benchmark runs at its smallest size, and prints its figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run_all import HERE, SMALLEST, command
from tests.helpers.mlet_command import run_command

pytestmark = [pytest.mark.e2e, pytest.mark.multirank]

NUMBER = r"\d[\d,.]*(?:e[-+]?\d+)?"
# By benchmark, a pattern for each line that must be among those it prints.
PRINTED = {
    "exchange": [
        r"zipf ids, k 8, d 4, .*\b1\b.*: .*\b8\b.*, 2 ranks, (cpu|cuda)",
        *(
            rf"{way} +{NUMBER} +{NUMBER} - {NUMBER} +{NUMBER} +{NUMBER}"
            for way in (
                "single",
                "after",
                "reduce_scatter",
                "unique_rows",
                "auto",
                "single_table_wise",
                "table_wise",
            )
        ),
        rf"projection alone +{NUMBER}",
    ],
    "compression_arms": [
        rf'\{{.*"test_auc": {NUMBER}, "test_logloss": {NUMBER}, .*"training_share": 0\.[23]\d*, .*"form": "mixed".*\}}'
    ],
    "compression_grid": [
        rf"\| static 16, 8, 4 \| [+-]{NUMBER} ± {NUMBER} \(2\), 0\.\d\d \|",
        rf"\| static 16, 8, 4 \| 30% \| mixed \| {NUMBER}x [+-]{NUMBER} ± {NUMBER} \(2\) \|.*",
    ],
    "pipeline": [
        rf"auto .*\b8\b.*, 2 ranks, (cpu|cuda) +plain {NUMBER} ms .* pipelined {NUMBER} ms .* ratio {NUMBER} .*"
    ],
    "plan_accuracy": [
        rf"2 ranks, +8 rows each: predicted {NUMBER} ms, measured {NUMBER} ms, ratio {NUMBER} +\(latency .*\)",
        r'\{"cases": \[\{"ranks": 2, .*\}\], "lowest_ratio": .*, "within_1.5": (true|false)\}',
    ],
    "plan_memory": [
        rf"dlrm +1 ranks: predicted {NUMBER} MB, measured {NUMBER} MB, ratio {NUMBER}",
        r'\{"cases": \[\{"network": "dlrm", .*\}\]\}',
    ],
    "checkpoint": [
        r"ranks +2",
        *(rf"{name}_gb_per_s +{NUMBER}" for name in ("save", "write", "load", "verify", "read", "stage")),
        *(rf"step_seconds_{name} +{NUMBER}" for name in ("none", "async", "sync")),
        rf"save_over_write +{NUMBER}",
        rf"async_over_none +{NUMBER}",
    ],
    "export": [
        r"rows +1000",
        *(rf"{kind}_{way}_gb_per_s +{NUMBER}" for kind in ("warm", "cold") for way in ("read", "collapse", "load_all")),
        rf"collapse_over_read +{NUMBER}",
        rf"peak_rss_bytes +{NUMBER}",
    ],
    "job_backoff": [
        rf"\| `backoffLimit`, every fault ends all pods \| any \| {NUMBER} \| {NUMBER} \| {NUMBER} \|",
        rf"\| .*, a rank crashes \| any \| {NUMBER} \| {NUMBER} \| {NUMBER} \|",
    ],
    "owners": [
        *(
            rf"\| {ids}, Zipf {exponent} \| 4,096 \| {ranks} \| {NUMBER} \| 1\.[01]\d \| 1\.00 \|"
            for ids in ("Criteo-1TB", "one table")
            for exponent in (r"1\.05", r"1\.2")
            for ranks in (2, 8)
        ),
        r'\{"cases": .*\}',
    ],
    "loader": [
        *(
            rf"{way} +{NUMBER} rows/s +{NUMBER} (…|to) {NUMBER}"
            for way in ("pyarrow", "in_order", "shuffled", "torchrec", "torchrec_shuffled")
        ),
        rf"from disk: ours_from_disk_rows_per_s {NUMBER}, .*torchrec_from_disk_rows_per_s {NUMBER}, .*",
        rf"one thread, ns (a|per) row: decode {NUMBER}, .*",
    ],
    "openmp_waiting": [rf"(0|default) +{NUMBER} +{NUMBER} \({NUMBER}\)"],
    "step": [
        r"64-2-uniform-sgd: 64 rows on each of 2 ranks, uniform ids \(made\), sgd; .*",
        *(
            rf"{model} +{NUMBER} +{NUMBER} - {NUMBER} +{NUMBER} +\d+ +\d+ +{NUMBER}"
            for model in ("plain_single", "plain_mlet", "single", "single_planned", "mlet_single", "composed", "mlet")
        ),
        rf"composed_over_mlet +{NUMBER} +\({NUMBER} - {NUMBER}; cpu {NUMBER}\)",
        rf"floor: products {NUMBER} ms, .*",
    ],
    "sizes": [
        *(
            rf"\| {way} \| {NUMBER} ± – \| {NUMBER} ± – \| {NUMBER} ± – \|"
            for way in ("runs of their own", "nested, all", "nested, sampled", "cut after training")
        ),
        rf"\| 6x \| \S+ \| [+-]{NUMBER} ± – \| [+-]{NUMBER} ± – \|",
    ],
    "prepare": [
        rf"ours {NUMBER} rows/s, line_by_line {NUMBER} rows/s, polars {NUMBER} rows/s",
        rf"rows 2000 .*rows_per_s {NUMBER} +over_line_by_line {NUMBER}",
    ],
}


def test_every_benchmark_has_a_smallest_size_and_a_check() -> None:
    scripts = {path.stem for path in HERE.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    # loader.py starts loader_from_disk.py.
    assert scripts - {"run_all", "loader_from_disk"} == set(SMALLEST) == set(PRINTED)


def check_step_cases(cases: list[dict[str, Any]]) -> None:
    (case,) = cases
    assert (case["batch_size"], case["ranks"], case["ids"], case["optimizer"]) == (64, 2, "uniform", "sgd")
    models = {"plain_single", "plain_mlet", "single", "single_planned", "composed", "mlet"}
    assert models <= case["ms"].keys()
    assert all(case["ms"][model] > 0 for model in models)
    ratios = "single_over_plain mlet_over_plain_mlet mlet_over_single mlet_over_single_planned composed_over_mlet"
    assert all(case[ratio] > 0 for ratio in ratios.split())
    assert 0 < case["collectives_per_step"] <= 6
    assert case["host_synchronisations_per_step"] <= 2
    assert case["operations"]["plain_mlet"]["collectives"]["allreduce_"] > 0
    assert case["floor"]["flops"] > 0


@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark_prints_its_figures(name: str, tmp_path: Path) -> None:
    output = run_command(command(name, tmp_path)).stdout
    lines = [line.strip() for line in output.splitlines()]
    for pattern in PRINTED[name]:
        assert any(re.fullmatch(pattern, line) for line in lines), f"no line is {pattern!r} in\n{output}"
    if name == "step":
        check_step_cases(json.loads(lines[-1])["cases"])
    assert list(tmp_path.iterdir()) == []
