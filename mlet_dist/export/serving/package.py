"""The serving package: one scripted model that contains its tables, an example request, and programs that run it."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fbgemm_gpu
import torch
from torch import fx, nn
from torchrec.distributed.types import BoundsCheckMode
from torchrec.fx import Tracer
from torchrec.pt2.utils import deregister_fake_classes, register_fake_classes
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist import __version__
from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.outputs import read_parts
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.export.serving.mixed_tables import MixedWidthCollection
from mlet_dist.export.serving.predictor import ExportedPredictor, Predictor, Request, example_request
from mlet_dist.export.serving.quantised import dense_tensors, load_dense, table_tensors
from mlet_dist.export.serving.served_model import build_of_layout, layout_of, with_ids_mapped
from mlet_dist.formatting import to_json
from mlet_dist.machine_limits import memory_bytes
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import collections_of

SCRIPTED, EXPORTED = "model.pt", "model.pt2"
_BLOCK_ROWS = 1 << 16
_TRIAL_ROWS = 8
_PROGRAMS = Path(__file__).parent / "package_files"
_TABLES = "IntNBitTableBatchedEmbeddingBagsCodegen"


class Package:
    """A serving package that is being built, with all encoded tables in memory.

    ::

        model.pt               TorchScript: (dense, ids, lengths[, weights]) -> probabilities
        model.pt2              the same model by torch.export
        example_request.json   a request and its answer
        signature.json         names and sizes of the inputs; versions
        README.md, serve.py, serve.cpp

    Args:
        spec: of the served model.
        encoding: of its tables.
        layout: of its tables; None for all rows.
    """

    def __init__(self, spec: ModelSpec, encoding: Encoding, layout: ServedLayout | None = None) -> None:
        self._spec, self._encoding = spec, encoding
        self._layout = layout_of(spec) if layout is None else layout
        self._model = build_of_layout(spec, self._layout, encoding)
        self._tables = table_tensors(self._model)

    def write_rows(self, state_name: str, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Copy encoded rows, as returned by ``Encoding.encode``, into a table from row ``start`` on."""
        for suffix, rows in parts.items():
            table = self._tables[state_name + suffix]
            table[start : start + len(rows)] = rows.view(table.dtype)

    def save(self, directory: Path, dense: Mapping[str, torch.Tensor]) -> None:
        """Write the files.

        Args:
            directory: must exist.
            dense: all tensors except the tables, by state name; with W2 and the ids of kept rows that the layout names.

        Raises:
            UserError: a file cannot be written.
        """
        load_dense(self._model, dense)
        (collection,) = collections_of(self._model).values()
        if isinstance(collection, MixedWidthCollection):
            collection.load_projections(dense)
            collection = collection.parts
        # They are views of the tables by name, which torch.export would save as copies.
        collection.embedding_bags = nn.ModuleDict()
        for module in self._model.modules():
            if type(module).__name__ == _TABLES:
                # By default fbgemm looks up row 0 for an invalid id. Predictor rejects these.
                module.bounds_check_mode_int = BoundsCheckMode.NONE.value
        request = example_request(self._spec)
        scripted = _script(self._mapped(_traced(self._model), dense), self._spec)
        exported = _export(self._mapped(self._model, dense), self._spec, request)
        try:
            torch.jit.save(scripted, directory / SCRIPTED)
            torch.export.save(exported, directory / EXPORTED)
        except RuntimeError as error:  # torch's writers raise no OSError
            raise UserError(f"{directory}: cannot be written: {' '.join(str(error).split())[:200]}") from None
        answer = torch.jit.load(directory / SCRIPTED)(*request.tensors())
        _write(directory / "example_request.json", request.to_dict() | {"probability": answer.tolist()})
        _write(directory / "signature.json", self._signature())
        for program in sorted(_PROGRAMS.iterdir()):
            if program.is_file():
                shutil.copyfile(program, directory / program.name)

    def dense_tensors(self) -> dict[str, torch.Tensor]:
        """Return what ``save`` takes of the layers other than tables, with their initial values."""
        return dense_tensors(self._model)

    def _mapped(self, model: nn.Module, dense: Mapping[str, torch.Tensor]) -> nn.Module:
        return with_ids_mapped(model, self._spec, self._layout, dense)

    def _signature(self) -> dict[str, Any]:
        keys = ("name", "table_name", "num_embeddings", "multi_valued", "weighted")
        return {
            "dense": list(self._spec.dense),
            "features": [
                {key.removesuffix("_name"): getattr(feature, key) for key in keys} for feature in self._spec.sparse
            ],
            **({"labels": list(self._spec.labels)} if len(self._spec.labels) > 1 else {}),
            "vocabulary_id": self._spec.vocabulary_id,
            "preprocessing": self._spec.preprocessing and self._spec.preprocessing.to_dict(),
            "tables": self._encoding.name,
            "versions": {
                "mlet_dist": __version__,
                "torch": torch.__version__,
                "fbgemm_gpu": fbgemm_gpu.__version__,
                "torchrec": version("torchrec"),
            },
        }


def write_package(
    directory: Path,
    spec: ModelSpec,
    encoding: Encoding,
    stored: ChunkedTensors,
    dense: Mapping[str, torch.Tensor],
    layout: ServedLayout,
) -> None:
    """Write a package with the tables of an existing output.

    Args:
        directory: must exist and be empty.
        spec: of the served model.
        encoding: of the output.
        stored: the output's tensors.
        dense: the tensors of the layers other than tables, by state name.
        layout: of the output.

    Raises:
        UserError: a file cannot be read or written, or is damaged.
    """
    package = Package(spec, encoding, layout)
    for part in layout.parts:
        name = f"{spec.tables_prefix}embedding_bags.{part.name}.weight"
        for start in range(0, part.num_embeddings, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, part.num_embeddings)
            package.write_rows(name, start, read_parts(stored, encoding, name, start, stop, part.embedding_dim))
    package.save(directory, {**dense, **{name: stored.load(name) for name in layout.tensor_names}})


def check_fits(layout: ServedLayout, encoding: Encoding) -> None:
    """Raise UserError if a package's tables do not fit into the memory of this machine or container."""
    needed = layout.table_bytes(encoding)
    memory, _ = memory_bytes()
    if needed > memory:
        raise UserError(
            f"a package keeps all tables in one process: in {encoding.name} they take {needed:,} bytes, and this "
            f"machine has {memory:,}; export without the package, and serve the {encoding.name} output sharded"
        )


def check_can_be_packaged(spec: ModelSpec, encoding: Encoding) -> None:
    """Check that the network of a spec can be traced, scripted and exported, on tables of a few rows.

    Raises:
        UserError: it cannot.
    """
    sparse = tuple(replace(each, num_embeddings=min(_TRIAL_ROWS, each.num_embeddings)) for each in spec.sparse)
    with TemporaryDirectory() as directory:
        try:
            package = Package(replace(spec, sparse=sparse), encoding)
            package.save(Path(directory), package.dense_tensors())
        except UserError:
            raise
        except Exception as error:  # whatever torch raises at code that it cannot trace
            raise UserError(
                f"the network cannot be packaged: {type(error).__name__}: {' '.join(str(error).split())[:300]}; write "
                "forward so that torch.fx, torch.jit.script and torch.export can trace it, or leave package out of the "
                "outputs"
            ) from error


def _traced(model: nn.Module) -> fx.GraphModule:
    graph = Tracer(leaf_modules=[_TABLES]).trace(model)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, kind in zip(inputs, (torch.Tensor, KeyedJaggedTensor), strict=True):
        node.type = kind  # a forward without annotations would be scripted as one of tensors
    return fx.GraphModule(model, graph)


def _script(model: nn.Module, spec: ModelSpec) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about annotations in TorchRec
        return torch.jit.script(Predictor(model, spec).eval())


def _export(model: nn.Module, spec: ModelSpec, request: Request) -> torch.export.ExportedProgram:
    rows, ids = torch.export.Dim("rows"), torch.export.Dim("ids")
    shapes = [{0: rows}, {0: ids}, {1: rows}, {0: ids}]
    tensors = request.tensors()
    register_fake_classes()  # torch.export requires fake versions of fbgemm's classes
    try:
        return torch.export.export(
            ExportedPredictor(model, spec).eval(),
            tensors,
            dynamic_shapes=tuple(shapes[: len(tensors)]),
            strict=False,
        )
    finally:
        deregister_fake_classes()


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
