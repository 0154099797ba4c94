"""`mlet export --budget`: which widths are chosen, that they fit, and that what is measured is what is served."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from mlet_dist.config.byte_sizes import bytes_within
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.budget import run_budget
from mlet_dist.export.budget.allocation import Block, PricedTable, allocate, costs_of, widths_of
from mlet_dist.export.encoding import ENCODINGS, Encoding, RowOverflow
from mlet_dist.export.measured_split import MeasuredSplit, SplitModel, lookup_factors, served_vectors
from mlet_dist.export.source import ModelSource
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import ModelSpec
from tests.helpers.mlet_command import error_line, mlet, mlet_json
from tests.helpers.train_in_ranks import Ranks, train_in_ranks
from tests.training.test_absent_splits import make_data, settings_of

FP32 = ENCODINGS["fp32"]


def blocks(draw: torch.Generator, sizes: tuple[int, ...], d: int) -> tuple[list[Block], list[torch.Tensor]]:
    """Return blocks of rows with random vectors, looked up less and less, and these times the root of their counts."""
    found, weighted, start = [], [], 0
    for number, size in enumerate(sizes):
        vectors = torch.randn(size, d, generator=draw, dtype=torch.float64)
        counts = torch.rand(size, generator=draw, dtype=torch.float64) / 2.0**number
        gram, total = vectors.T @ (vectors * counts[:, None]), (vectors * counts[:, None]).sum(0)
        found.append(Block(start, start := start + size, gram, total, float(counts.sum())))
        weighted.append(vectors * counts.sqrt()[:, None])
    return found, weighted


def test_costs_are_those_of_what_rows_lose() -> None:
    draw = torch.Generator().manual_seed(1)
    of_table, weighted = blocks(draw, (8, 12, 30), 8)
    slopes = torch.randn(20, 8, generator=draw, dtype=torch.float64)
    curvature = slopes.T @ slopes / 20
    costs = costs_of(of_table, curvature, (8, 4))
    _, _, directions = torch.linalg.svd(torch.cat(weighted))
    for row, vectors in enumerate(weighted):
        lost = vectors - vectors @ directions[:4].T @ directions[:4]
        expected = ((lost @ slopes.T) ** 2).sum() / 20 / 2
        assert float(costs[row, 0]) == pytest.approx(0, abs=1e-9)
        assert float(costs[row, 1]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_costs_of_a_shared_table_are_those_of_errors_of_its_rows(pooling: str) -> None:
    ids_of = {"item": 1, "seen": 4}  # the length of every bag of the two features, which share a table
    sparse = tuple(
        SparseFeature(name, 50, multi_valued=ids > 1, pooling_factor=ids, table="item") for name, ids in ids_of.items()
    )
    factors = lookup_factors(
        ModelSpec(ModelConfig(embedding_dim=4, hidden_dim=None, pooling=pooling), (), sparse, seed=0)
    )
    draw = torch.Generator().manual_seed(4)
    rows, d = 2000, 4
    slopes = {name: torch.randn(rows, d, generator=draw, dtype=torch.float64) for name in ids_of}
    bags = {name: torch.randint(50, (rows, ids), generator=draw) for name, ids in ids_of.items()}
    lengths = {name: ids if pooling == "mean" else 1 for name, ids in ids_of.items()}
    # The mean over many draws of errors of rows that do not depend on one another.
    errors = torch.randn(400, 50, d, generator=draw, dtype=torch.float64)
    moved = [
        sum((each[bags[name]].sum(1) / lengths[name] * slopes[name]).sum(1).square() for name in ids_of)
        for each in errors
    ]
    expected = torch.stack(moved).mean() / 2
    curvature = sum(factors[name] * slopes[name].T @ slopes[name] / rows for name in ids_of)
    lookups = sum(ids_of.values())  # of a row of the data; the covariance of errors is the identity
    # Ids that occur twice in a bag have the same error, which adds at most (4 - 1) / 50 to that of a bag.
    assert float(curvature.trace() * lookups / 2) == pytest.approx(float(expected), rel=0.08)


def test_the_widths_of_a_table_cost_least() -> None:
    draw = torch.Generator().manual_seed(2)
    for _ in range(20):
        sizes = tuple(torch.randint(1, 40, (5,), generator=draw).tolist())
        of_table, _ = blocks(draw, sizes, 8)
        costs = torch.rand(5, 3, generator=draw, dtype=torch.float64).cumsum(1)
        table = PricedTable(of_table, (8, 4), costs)
        priced = costs + 1e-3 * torch.tensor(sizes)[:, None] * torch.tensor([32, 16, 0])
        every = [each for each in itertools.product(range(3), repeat=5) if list(each) == sorted(each)]
        best = every[int(torch.stack([priced[range(5), each].sum() for each in every]).argmin())]
        rows = [sum(size for size, column in zip(sizes, best, strict=True) if column == wanted) for wanted in range(3)]
        if rows[2]:  # one more row is stored for all others to read
            rows = [rows[0], rows[1] + 1, rows[2] - 1] if rows[1] else [rows[0] + 1, 0, rows[2] - 1]
        expected = [RowRange(number, width) for number, width in zip(rows, (8, 4, 0), strict=True) if number]
        assert list(table.ranges(1e-3, FP32)) == expected


def test_a_budget_is_used_and_never_exceeded() -> None:
    draw = torch.Generator().manual_seed(3)
    tables = {}
    for name in "abc":
        of_table, _ = blocks(draw, (8, 8, 12, 18, 27, 40, 60, 90), 16)
        tables[name] = PricedTable(of_table, widths_of(16), costs_of(of_table, torch.eye(16).double(), widths_of(16)))

    def size_of(ranges: dict[str, tuple[RowRange, ...]]) -> int:
        return sum(each.rows * 4 * each.width for of_table in ranges.values() for each in of_table)

    whole, before = 3 * 263 * 64, math.inf
    for budget in (whole, whole // 2, whole // 5, whole // 20, 600):
        found = allocate(tables, FP32, budget, size_of)
        assert found is not None
        assert budget * 0.6 < size_of(found) <= budget
        assert all(sum(each.rows for each in of_table) == 263 for of_table in found.values())
        assert all(of_table[0].width > 0 for of_table in found.values())
        assert size_of(found) < before
        before = size_of(found)
    assert allocate(tables, FP32, 3 * 16 - 1, size_of) is None
    only = allocate(tables, FP32, whole // 5, size_of, dict.fromkeys(tables, (16,)))
    assert only is not None
    assert {each.width for of_table in only.values() for each in of_table} == {16, 0}


def test_budgets_as_text() -> None:
    assert bytes_within("20MB", 1) == 20_000_000
    assert bytes_within("5%", 1000) == 50
    assert bytes_within("12x", 1200) == 100
    assert bytes_within("1.5 X", 3000) == 2000
    for wrong in ("", "12", "0x", "x", "0.01%", "-3MB"):
        with pytest.raises(ValueError, match=r"not a size|less than a byte"):
            bytes_within(wrong, 1000)


def test_widths_are_multiples_of_four() -> None:
    assert widths_of(16) == (16, 12, 8, 4)
    assert widths_of(64) == (64, 48, 32, 24, 16, 8)
    assert widths_of(4) == (4,)


@pytest.fixture(scope="module")
def run(ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "run"
    settings = (*small_model, "model.embedding_dim=16", "model.hidden_dim=16", "model.nested_dims=[8]")
    train_in_ranks(
        *(ranks, 1, *settings, "optimizer.name=adagrad", "optimizer.learning_rate=0.05", f"run.dir={path}"),
    )
    return path


@pytest.mark.e2e
@pytest.mark.multirank
@pytest.mark.parametrize("budget", ["3x", "15x", "3%", "20KB"])
def test_the_best_candidate_is_exported_as_it_was_measured(
    run: Path, small_data: Path, tmp_path: Path, budget: str
) -> None:
    outputs = ("--outputs", "package") if budget == "15x" else ()
    found = mlet_json("export", run, "--out", tmp_path / "out", "--budget", budget, *outputs)
    best = found["chosen"]
    allowed = found["budget"]
    assert allowed == bytes_within(budget, found["table_bytes"])
    losses = [each["logloss"] for each in found["candidates"]]
    assert losses == sorted(losses)
    assert best == found["candidates"][0]
    assert all(each["bytes"] <= allowed for each in found["candidates"])
    assert {each["embedding_dim"] for each in found["candidates"]} == {8, 16}
    assert {each["rows"] for each in found["candidates"]} >= {"sensitivity", "counts", "kept"}
    assert found["served_bytes"][best["output"]] == best["bytes"]
    checked = mlet_json("verify", tmp_path / "out", "--run", run, "--data", small_data, "--split", "valid")
    # int4 changes the AUC of a few rows by more than is usual, and this is why the loss was measured.
    assert checked["outputs"][best["output"]]["logloss"] == pytest.approx(best["logloss"], abs=2e-6)
    of_run = mlet_json("evaluate", run, "--data", small_data, "--split", "valid")
    assert found["logloss"] == pytest.approx(of_run["logloss"], abs=1e-6)
    assert best["change"] == pytest.approx(best["logloss"] - found["logloss"], abs=1e-12)
    if outputs:
        assert found["served_bytes"]["package"] == best["bytes"]
        assert checked["outputs"]["package/model.pt"]["logloss"] == pytest.approx(best["logloss"], abs=1e-5)


@pytest.mark.e2e
@pytest.mark.multirank
def test_every_candidate_of_a_compressed_run_fits(
    ranks: Ranks, small_model: tuple[str, ...], small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (*small_model, "model.embedding_dim=16", "model.hidden_dim=null", "optimizer.name=adagrad")
    train_in_ranks(ranks, 1, *settings, "compression.policy=static", "compression.budget=0.4", f"run.dir={run}")
    one = mlet_json("export", run, "--out", tmp_path / "one", "--budget", "10x")
    two = mlet_json("export", run, "--out", tmp_path / "two", "--budget", "10x", "--nproc", 2)
    assert one["candidates"] == two["candidates"]
    assert one["served_bytes"] == two["served_bytes"]
    printed = mlet("export", run, "--out", tmp_path / "text", "--budget", "10x").stdout.splitlines()
    assert printed[0].startswith(
        f"{one['rows']:,} rows of valid; budget {one['budget']:,} bytes; LogLoss of the float32"
    )
    assert len(printed) == len(one["candidates"]) + 3
    assert printed[-1].startswith(
        f"exported: {one['chosen']['output']} of 16 columns, {one['chosen']['bytes']:,} bytes"
    )
    checked = mlet_json(
        *("verify", tmp_path / "one", "--run", run, "--data", small_data, "--split", "valid"),
        *("--auc-tolerance", "int4=0.05", "int8=0.05", "fp16=0.05"),
    )
    assert checked["ok"] is True


@pytest.mark.e2e
@pytest.mark.multirank
def test_curvatures_are_those_of_single_rows(run: Path, small_data: Path) -> None:
    with ModelSource.open(run) as source:
        split = MeasuredSplit(source, small_data, "test")
        vectors = split.read(source)
        found = split.model(source).curvatures(vectors)
        spec = source.spec.with_hidden_dim(None)
        served = build_serving_model(spec)
        dense = {name: source.load_dense(name) for name in source.dense}
        tables = {}
        for table in source.tables.values():
            assert table.projection is not None
            tables[table.state_name] = table.read_stored(0, table.num_embeddings) @ table.projection
        served.load_state_dict(dense | tables)
        name = next(iter(source.tables))
        weight = served.state_dict(keep_vars=True)[source.tables[name].state_name]
        expected, rows = torch.zeros(16, 16, dtype=torch.float64), 0
        for batch in split._batches():
            logits = served(batch.dense, batch.sparse).reshape(-1)[: batch.num_rows]
            rows += batch.num_rows
            for row, logit in enumerate(logits):
                (slope,) = torch.autograd.grad(logit, weight, retain_graph=True)
                own = slope[int(batch.sparse[name].values()[row])].double()
                odds = float(logit.detach().sigmoid())
                expected += odds * (1 - odds) * torch.outer(own, own)
        torch.testing.assert_close(found[name], expected / rows, rtol=1e-4, atol=1e-9)


@pytest.mark.e2e
@pytest.mark.multirank
def test_budgets_that_cannot_be_met_are_one_line(run: Path, small_data: Path, tmp_path: Path) -> None:
    out = ("export", run, "--out", tmp_path / "out")
    line = error_line(*out, "--budget", "100B")
    assert "take at least" in line
    assert line.endswith("bytes, one row of each, and the budget is 100 bytes; use a larger one")
    line = error_line(*out, "--budget", "12")
    assert line.startswith("mlet: error: --budget: '12' is not a size; write a number above 0 and one of B, ")
    assert line.endswith("or write 12x, a twelfth of the float32 tables, or 5% of them")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    # One line: no progress of candidates, which are not measured before.
    line = error_line("export", run, "--out", tmp_path / "taken", "--budget", "12x")
    assert line.endswith("taken: exists and is not empty; name another directory or remove this one")
    line = error_line(*out, "--budget", "12x", "--outputs", "int8")
    assert line.endswith("--budget chooses the output itself; leave out --outputs int8")
    line = error_line(*out, "--budget", "12x", "--dims", "8")
    assert line.endswith("--budget chooses the columns itself; leave --dims out")
    line = error_line(*out, "--budget", "12x", "--outputs", "package", "--package-tables", "int8")
    assert line.endswith("--package-tables names tables, and --budget chooses them; leave it out")
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_budget_needs_a_validation_split(tmp_path: Path) -> None:
    data = make_data(tmp_path, {"train": 0.75, "test": 0.25})
    mlet("train", *settings_of(data, tmp_path / "run"))
    line = error_line("export", tmp_path / "run", "--out", tmp_path / "out", "--budget", "2x")
    assert line.endswith(
        f"--budget 2x: {data} has no rows of a split valid, on which sizes are compared; name a data set that has them "
        "with --data"
    )


@pytest.mark.multirank
def test_what_cannot_be_measured_is_not_chosen(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that float16 cannot hold are no error, and a split that defines no LogLoss is one."""

    def served(ids: torch.Tensor, vectors: torch.Tensor, table: object, encoding: Encoding) -> torch.Tensor:
        if encoding.name == "fp16":
            raise RowOverflow(0, 1e6, "fp16")
        return served_vectors(ids, vectors, table, encoding)

    with ModelSource.open(run) as source:
        with monkeypatch.context() as patch:
            patch.setattr(run_budget, "served_vectors", served)
            _, found = run_budget.choose(source, "3x", None)
            assert {each["output"].partition("-")[0] for each in found["candidates"]} == {"dcp", "int8", "int4"}
            assert "--budget 3x: fp16-mixed is no candidate: the value 1e+06 is too large" in capsys.readouterr().err
        predicted = SplitModel._predicted
        with monkeypatch.context() as patch:
            patch.setattr(SplitModel, "_predicted", lambda *of: (*predicted(*of)[:2], torch.zeros(1, 1).double()))
            with pytest.raises(
                UserError, match=r"the LogLoss of .* on the split valid of .* is nan; sizes are compared"
            ):
                run_budget.choose(source, "3x", None)
        schema = DatasetSchema.load(Path(source.config["data"]["path"]))
        parts = {split: parts for split, parts in schema.parts.items() if split != "train"}
        monkeypatch.setattr(DatasetSchema, "load", lambda _: dataclasses.replace(schema, parts=parts))
        with pytest.raises(UserError, match="has no rows of a split train, by whose counts rows get their widths"):
            run_budget.choose(source, "3x", None)
