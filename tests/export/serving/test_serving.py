"""Plain TorchRec serves an export under any sharding and in any file format, without mlet_dist."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.made_run import make_run, random_rows
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.conftest import TrainedRun
from tests.helpers.export_units import export
from tests.helpers.mlet_command import ROOT
from tests.helpers.rows_by_id import model_by_id

TABLES = {"C1": 1, "C2": 1_003, "C3": 50}
SHARDS = {
    None: None,
    "table_wise": [(1_003, 8)],
    "row_wise": [(502, 8), (501, 8)],
    "column_wise": [(1_003, 4), (1_003, 4)],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose tables have enough columns for column_wise sharding, and 300 rows of data for it."""
    folder = tmp_path_factory.mktemp("made")
    model = ModelConfig(embedding_dim=8, hidden_dim=24, bottom_mlp=(16,), top_mlp=(16,))
    make_run(folder / "run", TABLES, model, shards=2, rows=lambda *args: 0.3 * random_rows(*args))
    dense = random_rows("dense", 0, 300, 13)
    columns = {f"I{index}": dense[:, index - 1].numpy() for index in range(1, 14)}
    generator = torch.Generator().manual_seed(0)
    columns |= {name: torch.randint(rows, (300,), generator=generator).numpy() for name, rows in TABLES.items()}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "run", folder / "rows.parquet"


@pytest.mark.e2e
@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_torchrec_serves_the_same_logits_without_mlet_dist(
    trained: TrainedRun, exported: Path, made: tuple[Path, Path], tmp_path: Path, world_size: int
) -> None:
    run, rows = made
    shards, gathered = tmp_path / "shards", tmp_path / "gathered"
    export(run, shards, outputs=("dcp", "safetensors"))
    export(run, gathered, outputs=("dcp", "safetensors"), gather=True)
    part = trained.data / "test" / "part-00000.parquet"
    cases: list[tuple[Path, Path, str | None, str]] = [(exported, part, "planner", "dcp")]
    if world_size == 1:
        cases += [
            (exported, part, None, "dcp"),
            (shards, rows, None, "dcp_safetensors"),
            (gathered, rows, None, "safetensors"),
        ]
    else:
        cases += [(shards, rows, kind, "dcp") for kind in ("table_wise", "row_wise", "column_wise")]
        cases += [(shards, rows, "row_wise", "dcp_safetensors"), (gathered, rows, "column_wise", "dcp")]
    found = _serve(cases, world_size, tmp_path)

    expected = {
        part: _dlrm_in_float64(trained.path, part, tmp_path, spread=True),
        rows: _dlrm_in_float64(run, rows, tmp_path, spread=False),
    }
    assert expected[part].std() > 0.05
    assert expected[rows].std() > 0.05
    for (_, data, sharding, _), served in zip(cases, found, strict=True):
        if sharding != "planner":
            assert served["shards"].get("C2") == SHARDS[sharding]
        assert len(served["logits"]) == len(expected[data])
        torch.testing.assert_close(served["logits"].double(), expected[data], rtol=0, atol=1e-5)


def _serve(cases: list[tuple[Path, Path, str | None, str]], world_size: int, folder: Path) -> list[dict[str, Any]]:
    jobs = []
    for number, (path, rows, sharding, reader) in enumerate(cases):
        paths = {"export": str(path), "parquet": str(rows), "out": str(folder / f"{number}.pt")}
        jobs.append({**paths, "sharding": sharding, "reader": reader})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    program = [str(ROOT / "tests/helpers/plain_server.py"), str(folder / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command + program, cwd=folder, check=True, timeout=180, env=environment, capture_output=True)
    return [torch.load(job["out"]) for job in jobs]


def _dlrm_in_float64(run: Path, part: Path, scratch: Path, *, spread: bool) -> torch.Tensor:
    """Compute the logits of a DLRM of this test's sizes from the factorised weights, without TorchRec, in float64."""
    (checkpoint,) = sorted((run / "checkpoints").iterdir())[-1:]
    dcp_to_torch_save(checkpoint, scratch / "run.pt")
    state = _flat(torch.load(scratch / "run.pt", weights_only=False))
    if spread:
        state = model_by_id(state, ModelSpec.load(run / "model.json"))
    weights = {name: tensor.double() for name, tensor in state.items()}
    rows = pq.read_table(part)

    def linear(values: torch.Tensor, layer: str) -> torch.Tensor:
        return values @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]

    dense = torch.tensor([rows[f"I{i}"].to_pylist() for i in range(1, 14)], dtype=torch.float64).T
    for layer in ("0", "1"):
        dense = linear(dense, f"dense_arch.model._mlp.{layer}._linear").relu()
    vectors = [dense]
    for name in (name for name in rows.column_names if name.startswith("C")):
        found = weights[f"{TABLES_PREFIX}embedding_bags.{name}.weight"][rows[name].to_pylist()]
        vectors.append(found @ weights[f"{TABLES_PREFIX}projections.{name}.weight"])
    stacked = torch.stack(vectors, dim=1)
    products = stacked @ stacked.transpose(1, 2)
    above = torch.triu_indices(len(vectors), len(vectors), offset=1)
    hidden = linear(
        torch.cat([dense, products[:, above[0], above[1]]], dim=1), "over_arch.model.0._mlp.0._linear"
    ).relu()
    return linear(hidden, "over_arch.model.1").squeeze(1)


def _flat(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return the model's tensors by name, from keys "model.<name>" or a nested dict "model"."""
    model = state.get("model", state)
    assert isinstance(model, Mapping)
    return {name.removeprefix("model."): tensor for name, tensor in model.items() if isinstance(tensor, torch.Tensor)}
