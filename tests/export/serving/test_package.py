"""A serving package answers like TorchRec, without TorchRec and mlet_dist, and rejects invalid requests."""

import json
import runpy
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.inference.modules import quantize_inference_model
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.serving.package import Package
from mlet_dist.export.serving.predictor import Request
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.helpers.carried_preprocessing import PROGRAMS, carry


def _spec(weighted: bool) -> ModelSpec:
    """Return a spec in which C1 is multi-valued: sum pooling with weights, mean pooling without."""
    features = (SparseFeature("C0", 30), SparseFeature("C1", 20, True, weighted, 2.0), SparseFeature("C2", 7))
    model = ModelConfig(
        embedding_dim=12, hidden_dim=None, bottom_mlp=(8,), top_mlp=(8,), pooling="sum" if weighted else "mean"
    )
    return ModelSpec(model, ("I1", "I2"), features, seed=3)


def _request(spec: ModelSpec, rows: int) -> Request:
    lengths = torch.ones(3, rows, dtype=torch.int64)
    lengths[1] = torch.arange(rows) % 4
    ids = [
        torch.randint(0, each.num_embeddings, (int(n),)) for each, n in zip(spec.sparse, lengths.sum(1), strict=True)
    ]
    weights = torch.cat([torch.rand(len(each)) if i == 1 else torch.ones(len(each)) for i, each in enumerate(ids)])
    return Request(torch.randn(rows, 2), torch.cat(ids), lengths, weights if spec.is_weighted else None)


def _make(directory: Path, spec: ModelSpec, name: str) -> torch.nn.Module:
    """Write a package of a random model, and return the model."""
    torch.manual_seed(5)
    model, encoding = build_serving_model(spec).eval(), ENCODINGS[name]
    package, dense = Package(spec, encoding), {}
    for key, tensor in model.state_dict().items():
        if not key.startswith(TABLES_PREFIX):
            dense[key] = tensor
            continue
        tensor.normal_()
        for start in range(0, len(tensor), 16):
            package.write_rows(key, start, encoding.encode(tensor[start : start + 16].contiguous()))
    directory.mkdir()
    package.save(directory, dense)
    return model


def _answer(model: torch.nn.Module, spec: ModelSpec, request: Request) -> torch.Tensor:
    names = [feature.name for feature in spec.sparse]
    sparse = KeyedJaggedTensor(names, request.ids, request.weights, request.lengths.flatten())
    with torch.no_grad():
        return torch.sigmoid(model(request.dense, sparse).squeeze(1))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """int8 packages of a model with or without a weighted feature."""
    made: dict[bool, Path] = {}

    def package(weighted: bool) -> Path:
        if weighted not in made:
            made[weighted] = tmp_path_factory.mktemp("package") / "package"
            _make(made[weighted], _spec(weighted), "int8")
        return made[weighted]

    return package


@pytest.mark.parametrize(("name", "weighted"), [("fp32", False), ("fp16", True), ("int8", False), ("int4", True)])
def test_answers_equal_those_of_torchrecs_quantised_model(tmp_path: Path, name: str, weighted: bool) -> None:
    spec = _spec(weighted)
    model = _make(tmp_path / "package", spec, name)
    if name != "fp32":
        dtype = {"fp16": torch.float16, "int8": torch.int8, "int4": torch.quint4x2}[name]
        model = quantize_inference_model(model, quantization_dtype=dtype)
    scripted = torch.jit.load(tmp_path / "package" / "model.pt")
    exported = torch.export.load(tmp_path / "package" / "model.pt2").module()
    for rows in (1, 9):
        request = _request(spec, rows)
        expected = _answer(model, spec, request)
        torch.testing.assert_close(scripted(*request.tensors()), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(exported(*request.tensors()), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05


def test_serve_py_and_the_exported_program_answer_without_torchrec(packages: Callable[[bool], Path]) -> None:
    package = packages(False)
    request = json.loads((package / "example_request.json").read_text())
    code = (
        "import sys, runpy, json; sys.modules['mlet_dist'] = sys.modules['torchrec'] = None; sys.argv.pop(0); "
        "serve = runpy.run_path(sys.argv[0]); torch = serve['torch']; serve['main'](); "
        "model = torch.export.load(sys.argv.pop()).module(); "
        "request = json.load(open(serve['PACKAGE'] / 'example_request.json')); "
        "print(serve['predict'](model, request).tolist())"
    )
    command = [
        sys.executable,
        "-c",
        code,
        package / "serve.py",
        package / "example_request.json",
        package / "model.pt2",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["probability"] == pytest.approx(request["probability"], abs=1e-6)
    assert second == pytest.approx(request["probability"], abs=1e-6)


def test_serve_py_reports_an_invalid_request(packages: Callable[[bool], Path], tmp_path: Path) -> None:
    package = packages(False)
    request = json.loads((package / "example_request.json").read_text())
    request["ids"][-1] = 7
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, package / "serve.py", tmp_path / "request.json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "builtins.ValueError: id 7 of C2 is not in [0, 7)"
    assert done.stdout == ""


def _with(request: Request, **changes: object) -> tuple[object, ...]:
    values = {"dense": request.dense, "ids": request.ids, "lengths": request.lengths} | changes
    if request.weights is not None:
        values = values | {"weights": changes.get("weights", request.weights)}
    return tuple(values.values())


def _changed(tensor: torch.Tensor, where: object, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


_INVALID: list[tuple[str, Callable[[Request], tuple[object, ...]]]] = [
    ("id 30 of C0 is not in", lambda r: _with(r, ids=_changed(r.ids, 8, 30))),
    ("id 20 of C1 is not in", lambda r: _with(r, ids=_changed(r.ids, 9, 20))),
    ("id -1 of C2 is not in", lambda r: _with(r, ids=_changed(r.ids, -1, -1))),
    ("dense is .9, 1.; it must be .rows, 2", lambda r: _with(r, dense=r.dense[:, :1])),
    (r"lengths is .3, 9.; it must be .features, rows.: .3, 8", lambda r: _with(r, dense=r.dense[:8])),
    ("lengths is .27.; it must be", lambda r: _with(r, lengths=r.lengths.flatten())),
    ("lengths is .9, 3.; it must be", lambda r: _with(r, lengths=r.lengths.T)),
    ("dense must be float32", lambda r: _with(r, dense=r.dense.double())),
    ("not finite", lambda r: _with(r, dense=_changed(r.dense, (4, 1), torch.nan))),
    (r"lengths sums up to \d+, but there are \d+ ids", lambda r: _with(r, lengths=_changed(r.lengths, (1, 0), 1))),
    ("a number below 0", lambda r: _with(r, lengths=_changed(_changed(r.lengths, (1, 0), -1), (1, 1), 2))),
    ("lengths of C0 must all be 1", lambda r: _with(r, lengths=_changed(_changed(r.lengths, (0, 0), 2), (0, 1), 0))),
]


@cache
def _loaded(package: Path) -> tuple[Any, Any]:
    """Return the TorchScript and the exported program of a package, which one server would load once, too."""
    return torch.jit.load(package / "model.pt"), torch.export.load(package / "model.pt2").module()


@pytest.mark.parametrize(("message", "invalid"), _INVALID, ids=[message for message, _ in _INVALID])
def test_an_invalid_request_is_rejected(
    packages: Callable[[bool], Path], message: str, invalid: Callable[[Request], tuple[object, ...]]
) -> None:
    scripted, exported = _loaded(packages(False))
    request = _request(_spec(False), 9)
    with pytest.raises(torch.jit.Error, match=message):
        scripted(*invalid(request))
    with pytest.raises((RuntimeError, AssertionError)):
        exported(*invalid(request))


@pytest.mark.parametrize(
    ("message", "weights"),
    [
        ("must be .* float32, one per id", lambda r: r.weights[1:]),
        ("weights holds a value that is not finite", lambda r: _changed(r.weights, 0, torch.inf)),
        ("weights is missing", lambda r: None),
    ],
)
def test_invalid_weights_are_rejected(
    packages: Callable[[bool], Path], message: str, weights: Callable[[Request], object]
) -> None:
    request = _request(_spec(True), 9)
    invalid = _with(request, weights=weights(request))
    scripted, exported = _loaded(packages(True))
    with pytest.raises(torch.jit.Error, match=message):
        scripted(*invalid)
    with pytest.raises((RuntimeError, AssertionError, AttributeError)):
        exported(*invalid)
    with pytest.raises(torch.jit.Error, match="weights is given, but"):
        _loaded(packages(False))[0](*request.tensors())


def test_a_package_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    package = Package(_spec(False), ENCODINGS["int8"])
    dense = {name: tensor for name, tensor in build_serving_model(_spec(False)).state_dict().items()}
    with pytest.raises(UserError, match="nowhere: cannot be written"):
        package.save(tmp_path / "nowhere", dense)


def _preprocessing(path: Path) -> tuple[Path, Path]:
    """Return what makes the inputs of ``_spec(True)`` from raw rows, and a file of such rows."""
    (path / "table.yaml").write_text(
        'format: csv\ndelimiter: "\\t"\nlabel: {column: y}\n'
        "dense: [{column: I1, transform: standardise}, {column: I2}]\n"
        "sparse:\n  - {column: C0, encoding: hash, num_embeddings: 30}\n"
        "  - {column: C1, encoding: hash, num_embeddings: 20, separator: ' ', weight_separator: ':'}\n"
        "  - {column: C2, encoding: hash, num_embeddings: 7}\n"
    )
    lines = [
        f"{n % 2}\t{n / 7}\t{n}\tu{n}\t{' '.join(f'g{m}:0.{m}' for m in range(n % 4))}\tc{n % 5}" for n in range(30)
    ]
    (path / "rows.tsv").write_text("\n".join(["y\tI1\tI2\tC0\tC1\tC2", *lines]) + "\n")
    prepare(load_table(path / "table.yaml"), [path / "rows.tsv"], path / "data")
    return carry(LikeDataset.open(str(path / "data")), path / "carried"), path / "rows.tsv"


@pytest.mark.skipif(shutil.which("g++") is None, reason="requires a C++ compiler")
def test_the_example_in_cpp_gives_the_same_answer(packages: Callable[[bool], Path], tmp_path: Path) -> None:
    package, libraries = packages(True), Path(site.getsitepackages()[0])
    source = (package / "serve.cpp").read_text()
    compiling = source[source.index("g++") : source.index("//   ./serve")].replace("\\\n//", "")
    command = compiling.replace("$SITE", str(libraries)).replace(" -O1", " -O0").split()
    build = tmp_path / "build" / "package"  # beside what it includes
    shutil.copytree(package, build)
    shutil.copytree(PROGRAMS, build.parent / "preprocessing")
    subprocess.run([*command, "-o", tmp_path / "serve"], cwd=build, check=True, timeout=300)
    running = [tmp_path / "serve", package, libraries / "fbgemm_gpu"]
    done = subprocess.run(running, check=True, capture_output=True, text=True, timeout=120)
    expected = json.loads((package / "example_request.json").read_text())["probability"]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected, abs=1e-6)

    preprocessing, rows = _preprocessing(tmp_path)
    shutil.copytree(package, tmp_path / "export" / "package")
    shutil.move(preprocessing, tmp_path / "export" / "preprocessing")
    running[1] = tmp_path / "export" / "package"
    done = subprocess.run([*running, rows], check=True, capture_output=True, text=True, timeout=120)
    serve = runpy.run_path(str(running[1] / "serve.py"))
    names, *lines = (line.split("\t") for line in rows.read_text().splitlines())
    request = {"rows": [dict(zip(names, line, strict=True)) for line in lines]}
    found = serve["predict"](torch.jit.load(package / "model.pt"), request)
    assert [float(line) for line in done.stdout.split()] == pytest.approx(found.tolist(), abs=1e-6)

    invalid = shutil.copytree(package, tmp_path / "invalid")
    request = json.loads((invalid / "example_request.json").read_text())
    request["ids"][0] = -1
    (invalid / "example_request.json").write_text(json.dumps(request))
    done = subprocess.run([running[0], invalid, running[2]], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "id -1 of C0 is not in [0, 30)" in done.stderr
