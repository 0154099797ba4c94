"""Kept rows and mixed widths of a compressed run: what is stored, and what plain TorchRec and packages answer."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import OUTPUTS
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.models.row_widths import static_ranges
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training import compressed_tables
from tests.helpers.export_units import contents, export_in_rank
from tests.helpers.export_units import export as export_in_units
from tests.helpers.mlet_command import ROOT, error_line, mlet_json
from tests.helpers.rows_by_id import model_by_id
from tests.helpers.tampered_export import change_manifest, change_tensor
from tests.helpers.train_in_ranks import Ranks, train_in_ranks

pytestmark = pytest.mark.e2e

FORMS = [name for name, output in OUTPUTS.items() if output.form != "all"]
STATIC = ("dcp-kept", "int8-kept", "dcp-mixed", "int4-mixed")
LOGIT = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.03, "int4": 0.5}
"""The largest difference of a logit from that of the trained model in float64."""


def ranges_with_gaps(counts: Mapping[str, Any], *_: object) -> dict[str, tuple[RowRange, ...]]:
    """Return ranges as no policy chooses them: rows that are not stored between others, and wide rows behind narrow."""
    found = {}
    for name, each in counts.items():
        rest = len(each) - 30
        gaps = (RowRange(5, 16), RowRange(9, 8), RowRange(3, 0), RowRange(9, 4), RowRange(4, 0), RowRange(rest, 4))
        found[name] = gaps if rest > 50 else (RowRange(len(each), 16),)
    return found


def _choose_widths(choose: Callable[..., dict[str, tuple[RowRange, ...]]]) -> None:
    compressed_tables.static_ranges = choose


@pytest.fixture(scope="module", params=["static", "gaps"])
def exported(
    request: pytest.FixtureRequest,
    small_data: Path,
    small_model: tuple[str, ...],
    ranks: Ranks,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, dict[str, Any]]:
    """A compressed run, its export in all forms, and the result of `mlet export --json`."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = (*small_model, "model.embedding_dim=8", "model.hidden_dim=16", "optimizer.name=adagrad")
    settings += ("optimizer.learning_rate=0.05", f"run.dir={folder / 'run'}", "compression.policy=static")
    settings += ("compression.budget=0.45", "compression.widths=[16,8,4]")
    if request.param == "gaps":
        settings += ("compression.shared_rows=false",)
        ranks(1).run(_choose_widths, ranges_with_gaps)
    train_in_ranks(ranks, 1, *settings)
    ranks(1).run(_choose_widths, static_ranges)
    # Both kinds of run make all forms; the one whose kept rows are anywhere, in every encoding.
    names = [*OUTPUTS, "package"] if request.param == "gaps" else ["dcp", "int8", *STATIC, "package"]
    tables = ("--package-tables", "int4-mixed") if request.param == "gaps" else ()
    return (
        folder / "run",
        folder / "export",
        mlet_json("export", folder / "run", "--out", folder / "export", "--outputs", *names, *tables),
    )


Exported = tuple[Path, Path, dict[str, Any]]


def test_verify_passes_and_bytes_are_those_of_the_stored_rows(exported: Exported, small_data: Path) -> None:
    run, export, result = exported
    served, spec = result["served_bytes"], ModelSpec.load(run / "model.json")
    found = mlet_json("verify", export, "--run", run, "--data", small_data, "--auc-tolerance", "int4=0.02")
    assert found["ok"] is True
    assert {*served, "package/model.pt", "package/model.pt2"} == {*found["outputs"], "package"}
    for name, each in found["outputs"].items():
        if each["encoding"] == "fp32" and not name.startswith("package"):
            assert each["max_abs_logit_diff"] < 1e-5
    gaps = "fp16" in served
    assert served["package"] == served["int4-mixed" if gaps else "int8-kept"]
    for name, output in ((name, output) for name, output in OUTPUTS.items() if name in served):
        expected, row, d = 0, output.encoding.row_bytes, spec.model.embedding_dim
        for ranges in spec.row_ranges.values():
            if output.form == "all":
                expected += sum(rows for rows, _, _ in ranges) * row(d)
                continue
            sizes = [rows * row(d) for rows, width, _ in ranges if width]
            missing = any(not width for _, width, _ in ranges)
            zero_row = row(d) if missing and not spec.shared_rows else 0
            if output.form == "mixed":
                stored = [(rows, width) for rows, width, _ in ranges if width]
                sizes = [
                    min(rows * row(d), rows * row(width) + 4 * width * d) if width < d else rows * row(d)
                    for rows, width in stored
                ]
                last_rows, last = stored[-1]
                narrow = last < d and last_rows * row(last) + 4 * last * d < last_rows * row(d)
                zero_row = zero_row and row(last if narrow else d)
            expected += sum(sizes) + zero_row
        assert served[name] == expected, name
    assert served["int4-mixed"] < served["int8-kept"] < served["int8"] < served["dcp"]
    for name in ("dcp", "fp16", "int8", "int4") if gaps else ("dcp",):
        assert served[f"{name}-mixed"] < served[f"{name}-kept"] < served[name]
    assert set(result.get("kept_ids_bytes", {})) == ({*FORMS, "package"} if gaps else set())


def test_plain_torchrec_serves_all_forms_without_mlet_dist(
    exported: Exported, small_data: Path, tmp_path: Path
) -> None:
    run, export, result = exported
    part, out = small_data / "test" / "part-00000.parquet", tmp_path / "logits.pt"
    program = [sys.executable, str(ROOT / "tests/helpers/forms_server.py"), str(export), str(part), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(program, cwd=tmp_path, check=True, timeout=300, env=environment, capture_output=True)
    found, expected = torch.load(out), _dlrm_in_float64(run, part, tmp_path)
    assert set(found) == {*FORMS} & {*result["outputs"]}
    for name, logits in found.items():
        difference = (logits.double() - expected).abs().max()
        assert difference <= LOGIT[OUTPUTS[name].encoding.name], name
    assert expected.std() > 0.05


def test_encoded_rows_are_those_of_the_run(exported: Exported, tmp_path: Path) -> None:
    """Kept rows are encoded as those of an output of all rows, and narrow rows are W1."""
    run, export, _ = exported
    manifest = ExportDirectory(export).load()[1]
    state = {
        name: _loaded(export / manifest["outputs"][name]["directory"], tmp_path / f"{name}.pt")
        for name in ("int8", "int8-kept", "int4-mixed", "dcp")
    }
    layout = ServedLayout.from_dict(manifest["outputs"]["int8-kept"]["layout"])
    mixed = ServedLayout.from_dict(manifest["outputs"]["int4-mixed"]["layout"])
    narrow, spec = 0, ModelSpec.load(run / "model.json")
    for name, ranges in spec.row_ranges.items():
        stored = torch.cat([torch.full((rows,), bool(width)) for rows, width, _ in ranges])
        weight = f"{TABLES_PREFIX}embedding_bags.{name}.weight"
        missing, count = not bool(stored.all()), int(stored.sum())
        assert layout.tables[name].kept == count - (missing and spec.shared_rows)  # the last one is shared
        for suffix in ("", "_qscale", "_qbias"):
            kept = state["int8-kept"][f"{weight}{suffix}"]
            assert torch.equal(kept[:count], state["int8"][f"{weight}{suffix}"][stored])
            assert len(kept) == count + (missing and not spec.shared_rows)
        ids = layout.tables[name].kept_ids
        assert ids is None or torch.equal(state["int8-kept"][ids].long(), stored.nonzero()[:, 0])
        whole = state["dcp"][weight][stored].double()
        for part in mixed.tables[name].parts:
            weight = f"{TABLES_PREFIX}embedding_bags.{part.name}.weight"
            encoded = {suffix: state["int4-mixed"][f"{weight}{suffix}"] for suffix in ("", "_qscale", "_qbias")}
            rows, step = ENCODINGS["int4"].decode(encoded).double(), encoded["_qscale"].double()
            if part.projection is not None:
                projection = state["int4-mixed"][part.projection].double()
                rows, step = rows @ projection, step * projection.abs().sum(0)
                narrow += 1
            expected = whole[part.first_row : part.first_row + part.num_embeddings]
            assert bool(((rows[: len(expected)] - expected).abs() <= 0.51 * step[: len(expected)] + 2e-3).all())
            assert not bool(rows[len(expected) :].any())
    assert narrow > 5


def test_verify_names_the_id_of_a_row_that_differs(exported: Exported, small_data: Path, tmp_path: Path) -> None:
    run, export, _ = exported
    spec = ModelSpec.load(run / "model.json")
    stored = torch.cat([torch.full((rows,), bool(width)) for rows, width, _ in spec.row_ranges["C3"]])
    if spec.shared_rows:  # it is not among the kept rows, but behind them
        stored[int(stored.nonzero()[-1])] = False
    kept, weight = int(stored.sum()), f"{TABLES_PREFIX}embedding_bags.C3.weight"
    copy = shutil.copytree(
        export, tmp_path / "export", ignore=shutil.ignore_patterns("int*", "fp16*", "safe*", "pack*")
    )
    change_manifest(copy, lambda manifest: manifest.update(outputs={"dcp-kept": manifest["outputs"]["dcp-kept"]}))
    # A kept row, and the row behind them, which stands for all others.
    for number, row in ((kept - 1, int(stored.nonzero()[-1])), (kept, int((~stored).nonzero()[0]))):
        changed = shutil.copytree(copy, tmp_path / str(number))
        change_tensor(changed, "dcp-kept", weight, lambda table: table[number].add_(1.0))  # noqa: B023
        found = verify_export(changed, run, small_data)["outputs"]["dcp-kept"]
        assert found["ok"] is False
        assert found["tables"]["C3"]["worst_row"] == row
        assert found["tables"]["C3"]["max_abs_error"] == pytest.approx(1.0, abs=1e-4)
        assert found["tables"]["C4"]["max_abs_error"] < 1e-6
    assert found["max_abs_logit_diff"] > 1e-3

    def fewer(manifest: dict[str, Any]) -> None:
        manifest["outputs"]["dcp-kept"]["layout"]["tables"]["C3"]["kept"] -= 1

    change_manifest(copy, fewer)
    with pytest.raises(UserError, match=f"keeps {kept - 1} rows of table 'C3', which are not the {kept} that"):
        verify_export(copy, run, small_data)


@pytest.mark.multirank
def test_any_number_of_ranks_writes_the_same_files(exported: Exported, ranks: Ranks, tmp_path: Path) -> None:
    options = {"outputs": ("dcp", *STATIC, "int8-mixed"), "gather": "fp16" in exported[2]["outputs"]}
    single = export_in_units(exported[0], tmp_path / "1", **options)
    found = ranks(2).run(export_in_rank, exported[0], tmp_path / "2", options)[0]
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    assert found["served_bytes"] == single["served_bytes"]
    whole = _loaded(exported[1] / "model-kept", tmp_path / "whole.pt")
    units = _loaded(tmp_path / "1" / "model-kept", tmp_path / "units.pt")
    assert whole.keys() == units.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, units[name], rtol=1e-5, atol=1e-6)


def test_mixed_widths_have_no_serving_plan(exported: Exported, tmp_path: Path) -> None:
    start = ("export", exported[0], "--out", tmp_path / "out", "--serving-ranks", 2, "--serving-device", "cpu")
    assert "int8-mixed is served in one process" in error_line(*start, "--outputs", "int8-mixed")
    mlet_json(*start, "--outputs", "int8-kept")
    plan = json.loads((tmp_path / "out" / "manifest.json").read_text())["outputs"]["int8-kept"]["plan"]
    assert len(plan["tables"]) == 26


def _loaded(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint, scratch)
    found: dict[str, torch.Tensor] = torch.load(scratch)
    return found


def _dlrm_in_float64(run: Path, part: Path, scratch: Path) -> torch.Tensor:
    """Compute the logits from the run's pools and W2 in float64, without TorchRec."""
    (checkpoint,) = sorted((run / "checkpoints").iterdir())[-1:]
    state = model_by_id(_loaded(checkpoint, scratch / "run.pt")["model"], ModelSpec.load(run / "model.json"))
    weights = {name: tensor.double() for name, tensor in state.items()}
    rows = pq.read_table(part)

    def linear(values: torch.Tensor, layer: str) -> torch.Tensor:
        return values @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]

    dense = torch.tensor([rows[f"I{i}"].to_pylist() for i in range(1, 14)], dtype=torch.float64).T
    for layer in ("0", "1"):
        dense = linear(dense, f"dense_arch.model._mlp.{layer}._linear").relu()
    vectors, offsets = [dense], dict[int, int]()
    spec = ModelSpec.load(run / "model.json")
    for name, ranges in spec.row_ranges.items():
        products: list[torch.Tensor] = []
        for index, (count, width, _) in enumerate(ranges):
            start = offsets.get(width, 0)
            offsets[width] = start + count
            if not width:
                shared = products[-1][-1:].expand(count, -1) if spec.shared_rows else None
                products.append(torch.zeros(count, 8, dtype=torch.float64) if shared is None else shared)
                continue
            of_range = weights[f"{TABLES_PREFIX}embedding_bags.rows_{width}x8.weight"][start : start + count]
            w2 = None if width == 8 else weights[f"{TABLES_PREFIX}projections.{name}:{index}.weight"]
            products.append(of_range if w2 is None else of_range @ w2)
        vectors.append(torch.cat(products)[rows[name].to_pylist()])
    stacked = torch.stack(vectors, dim=1)
    above = torch.triu_indices(len(vectors), len(vectors), offset=1)
    pairs = (stacked @ stacked.transpose(1, 2))[:, above[0], above[1]]
    hidden = linear(torch.cat([dense, pairs], dim=1), "over_arch.model.0._mlp.0._linear").relu()
    return linear(hidden, "over_arch.model.1").squeeze(1)
