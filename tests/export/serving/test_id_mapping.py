"""Packages of kept rows and of mixed widths answer like dense float64 tables, for any kept rows, bags and pooling."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.collapse import collapse_rows
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.served_sources import ServedSources, served_sources
from mlet_dist.export.serving.package import Package
from mlet_dist.export.serving.predictor import Request
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.stored_tables.ranged_source import RangedTableSource
from mlet_dist.stored_tables.table_source import TableSource

RANGES = {
    "shared": (RowRange(4, 16), RowRange(6, 8), RowRange(150, 4), RowRange(40, 0)),
    "narrow": (RowRange(100, 4),),
    "gaps": (RowRange(3, 0), RowRange(90, 4), RowRange(5, 0), RowRange(2, 12), RowRange(7, 0), RowRange(95, 4)),
}


@dataclass
class _Files:
    """Tensors in memory in place of files."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


@dataclass(frozen=True)
class _Masked(TableSource):
    """A multi-layer table without ranges, of which any rows may be stored."""

    mask: torch.Tensor

    def stored_rows(self, start: int, stop: int) -> torch.Tensor | None:
        return self.mask[start:stop]


def _spec(pooling: str, weighted: bool) -> ModelSpec:
    features = (
        SparseFeature("A", 200, True, weighted, 2.0, "shared"),
        SparseFeature("B", 50, False, False, 1.0, "masked"),
        SparseFeature("C", 200, True, False, 2.0, "shared"),
        SparseFeature("D", 100, False, False, 1.0, "narrow"),
        SparseFeature("E", 202, True, weighted, 3.0, "gaps"),
    )
    model = ModelConfig(embedding_dim=8, hidden_dim=None, bottom_mlp=(8,), top_mlp=(8,), pooling=pooling)  # type: ignore
    return ModelSpec(model, ("I1", "I2"), features, seed=3)


def _tables() -> dict[str, TableSource]:
    files = _Files()
    found: dict[str, TableSource] = {}
    for name, ranges in RANGES.items():
        pools = []
        for index, (rows, width, _) in enumerate(ranges):
            files.tensors[f"{name}:{index}"] = torch.randn(rows, width)
            pools.append((f"{name}:{index}", 0, RowOrder((rows,))) if width else None)
        projection = torch.cat([torch.eye(8) if each.width == 8 else torch.randn(each.width, 8) for each in ranges])
        rows, width = sum(each.rows for each in ranges), sum(each.width for each in ranges)
        common = (name, f"{TABLES_PREFIX}embedding_bags.{name}.weight", rows, width, 8, projection, torch.float32, "")
        found[name] = RangedTableSource(*common, files, ranges, tuple(pools))  # type: ignore[arg-type]
    mask = torch.rand(50) < 0.4
    files.tensors["masked"] = torch.randn(50, 12) * mask[:, None]
    state_name = f"{TABLES_PREFIX}embedding_bags.masked.weight"
    projection = torch.randn(12, 8)
    found["masked"] = _Masked("masked", state_name, 50, 12, 8, projection, torch.float32, "masked", files, mask)  # type: ignore[arg-type]
    return found


def _package(
    directory: Path, spec: ModelSpec, served: ServedSources, name: str
) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Write a package; return the float64 rows of each table as they are stored, and a model with its dense layers."""
    encoding, package = ENCODINGS[name], Package(spec, ENCODINGS[name], served.layout)
    decoded: dict[str, torch.Tensor] = {}
    for part in served.layout.parts:
        source = served.tables[part.name]
        rows = source.read_stored(0, part.num_embeddings)
        rows = rows if source.projection is None else collapse_rows(rows, source.projection)
        assert rows.shape == (part.num_embeddings, part.embedding_dim)
        encoded = encoding.encode(rows)
        package.write_rows(f"{TABLES_PREFIX}embedding_bags.{part.name}.weight", 0, encoded)
        decoded[part.name] = encoding.decode(encoded).double()
        if part.projection is not None:
            decoded[part.name] = decoded[part.name] @ served.tensors[part.projection].double()
    model = build_serving_model(spec)
    dense = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(TABLES_PREFIX)}
    directory.mkdir()
    package.save(directory, dense | dict(served.tensors))
    whole = {}
    for table, layout in served.layout.tables.items():
        rows = torch.cat([decoded[part.name] for part in layout.parts])
        ids = torch.arange(layout.kept)
        if layout.kept_ids is not None:
            ids = served.tensors[layout.kept_ids].long()
        whole[table] = torch.zeros(layout.num_embeddings, 8, dtype=torch.float64)
        whole[table][ids] = rows[: layout.kept]
        assert not bool(rows[layout.kept :].any())
    return whole, model


def _request(spec: ModelSpec, rows: int) -> Request:
    one = torch.ones(rows, dtype=torch.int64)
    lengths = torch.stack([torch.randint(0, 5, (rows,)) if f.multi_valued else one for f in spec.sparse])
    counts = lengths.sum(1).tolist()
    ids = [torch.randint(0, f.num_embeddings, (n,)) for f, n in zip(spec.sparse, counts, strict=True)]
    weights = [torch.rand(n) if f.weighted else torch.ones(n) for f, n in zip(spec.sparse, counts, strict=True)]
    return Request(torch.randn(rows, 2), torch.cat(ids), lengths, torch.cat(weights) if spec.is_weighted else None)


def _answer(spec: ModelSpec, whole: dict[str, torch.Tensor], model: torch.nn.Module, request: Request) -> torch.Tensor:
    """Return the probabilities in float64, with TorchRec's dense layers alone."""
    model = model.double()
    vectors = {}
    bags = torch.repeat_interleave(torch.arange(request.lengths.numel()), request.lengths.flatten())
    weights = torch.ones(len(bags)) if request.weights is None else request.weights
    for number, feature in enumerate(spec.sparse):
        inside = bags // request.lengths.shape[1] == number
        rows = whole[feature.table_name][request.ids[inside]] * weights[inside, None].double()
        total = torch.zeros(request.lengths.shape[1], 8, dtype=torch.float64)
        total.index_add_(0, bags[inside] % request.lengths.shape[1], rows)
        mean = spec.model.pooling == "mean" and feature.multi_valued
        vectors[feature.name] = total / request.lengths[number].clamp(min=1)[:, None] if mean else total
    ordered = torch.stack([vectors[name] for name in model.sparse_arch.sparse_feature_names], dim=1)
    with torch.no_grad():
        crossed = model.inter_arch(model.dense_arch(request.dense.double()), ordered)
        return torch.sigmoid(model.over_arch(crossed).squeeze(1))


@pytest.mark.parametrize(
    ("form", "encoding", "pooling", "weighted"),
    [
        ("kept", "fp32", "sum", True),
        ("kept", "int8", "mean", False),
        ("mixed", "fp16", "sum", True),
        ("mixed", "int4", "mean", False),
    ],
)
def test_a_package_answers_like_dense_tables(
    tmp_path: Path, form: str, encoding: str, pooling: str, weighted: bool
) -> None:
    torch.manual_seed(0)
    spec = _spec(pooling, weighted)
    served = served_sources(_tables(), form, ENCODINGS[encoding])  # type: ignore[arg-type]
    assert {name for name, table in served.layout.tables.items() if table.kept_ids} == {"masked", "gaps"}
    if form == "mixed":
        assert [part.name for part in served.layout.tables["shared"].parts] == ["shared:0", "shared:2"]
        assert [part.embedding_dim for part in served.layout.tables["gaps"].parts] == [4, 8, 4]
        assert [part.name for part in served.layout.tables["narrow"].parts] == ["narrow"]
    whole, model = _package(tmp_path / "package", spec, served, encoding)
    scripted = torch.jit.load(tmp_path / "package" / "model.pt")
    exported = torch.export.load(tmp_path / "package" / "model.pt2").module()
    for rows in (1, 33):
        request = _request(spec, rows)
        expected = _answer(spec, whole, model, request)
        for found in (scripted(*request.tensors()), exported(*request.tensors())):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert expected.std() > 0.05
