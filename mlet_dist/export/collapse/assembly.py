"""What an export consists of, what of it is finished, and how it is put together."""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fbgemm_gpu
import torch

from mlet_dist import __version__
from mlet_dist.checkpoint.manifest import Checksum
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.units import UNIT_BYTES, Unit, units_of
from mlet_dist.export.collapse.work_directory import WorkDirectory, join_files
from mlet_dist.export.export_directory import FORMAT_VERSION, MANIFEST, PACKAGE, describe_tensor
from mlet_dist.export.formats.pieces import Piece
from mlet_dist.export.outputs import Output, open_output
from mlet_dist.export.serving.package import check_fits, served_bytes, write_package
from mlet_dist.export.serving.quantised import Serving, plan_serving
from mlet_dist.export.source import Source
from mlet_dist.formatting import to_json, with_checksum
from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.models.spec import ModelSpec

_BYTES_OF_A_FILE = 4096  # what a format puts around the values, its record and the file system's share, about


class Assembly:
    """An export in the making.

    Args:
        source: of the tables and the dense layers.
        outputs: what is asked for.
        gather: one file a table.
        work: where it is made.
        package: that of ``outputs`` whose tables go into a serving package; None for no package.
        serving: what quantised outputs are planned for; None for no plan.

    Attributes:
        units: all of them, by table.
        directories: where the units' files of an output lie in ``work``, by the output's name.
    """

    def __init__(
        self,
        source: Source,
        outputs: Sequence[Output],
        gather: bool,
        work: WorkDirectory,
        package: Output | None = None,
        serving: Serving | None = None,
    ) -> None:
        self.source, self.outputs, self.gather, self.work = source, outputs, gather, work
        self._package, self._serving = package, serving
        self.units = units_of(source.tables.values())
        parent = "parts" if gather else work.export.name
        self.directories = {output.name: f"{parent}/{output.directory}" for output in outputs}

    @property
    def served(self) -> ModelSpec:
        """The model whose state the export is."""
        spec = self.source.spec
        return dataclasses.replace(spec, model=dataclasses.replace(spec.model, hidden_dim=None))

    def job(self, device: torch.device) -> dict[str, Any]:
        """What decides about every bit of the finished work."""
        return {
            "format_version": FORMAT_VERSION,
            "versions": _versions(),
            "checkpoint": self.source.digest,
            "outputs": [output.name for output in self.outputs],
            "package": self._package and self._package.name,
            "serving": self._serving and dataclasses.asdict(self._serving),
            "gather": self.gather,
            "unit_bytes": UNIT_BYTES,
            "device": device.type,
        }

    def check(self) -> None:
        """Raise UserError where the source cannot give these outputs, before any of it is written."""
        for output in self.outputs:
            output.encoding.check(self.served.model.embedding_dim)
            if output.encoding.is_quantised and self._serving is not None:
                plan_serving(self.served, output.encoding, self._serving)
        if self._package is not None:
            check_fits(self.served, self._package.encoding)
        for name, shape in self._dense_shapes.items():
            self.source.check_shape(name, shape)

    def unfinished(self) -> list[Unit]:
        """Units that are still to be done."""
        finished = self.work.finished()
        return [unit for unit in self.units if not {unit.name, _joined(unit.table)} & finished]

    def unjoined(self) -> list[str]:
        """Tables whose units are still to be joined; they must be finished."""
        finished = self.work.finished()
        return [name for name in self.source.tables if _joined(name) not in finished]

    def join(self, table: str) -> None:
        """Make one file of a table's, for each output.

        Raises:
            UserError: a file cannot be read or written, or is damaged.
        """
        records = [self.work.recorded(unit.name) for unit in self.units if unit.table == table]
        entries = {file: entry for record in records for file, entry in record["files"].items()}
        pieces: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for output in self.outputs:
            parts = [Piece.from_dict(each) for record in records for each in record["pieces"][output.name]]
            directory = self.directories[output.name]
            whole = f"{self.work.export.name}/{output.directory}/{table}{output.format.suffix}"
            joined, files[whole] = join_files(self.work, output.format, directory, parts, entries, whole)
            pieces[output.name] = [piece.to_dict() for piece in joined]
        self.work.record(_joined(table), {"files": files, "pieces": pieces})
        for file in entries:
            (self.work.root / file).unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Write the dense layers, the indexes and the manifest; what ``export_run`` returns but ``out``."""
        if self.gather:
            records = [self.work.recorded(_joined(name)) for name in self.source.tables]
        else:
            records = [self.work.recorded(unit.name) for unit in self.units]
        dense = self._load_dense()
        outputs = {output.name: self._finish_output(output, records, dense) for output in self.outputs}
        if self._package is not None:
            outputs[PACKAGE] = self._finish_package(self._package, outputs, dense)
        tables = self._describe_tables()
        manifest = {
            "format_version": FORMAT_VERSION,
            "versions": _versions(),
            "run": {
                "path": str(self.source.path),
                "checkpoint": self.source.checkpoint,
                "checkpoint_sha256": self.source.digest,
                **_metrics(self.source.summary),
            },
            "config": self.source.config,
            "model": self.served.to_dict(),
            "outputs": outputs,
            "tables": tables,
            "dense": [describe_tensor(name, tensor) for name, tensor in dense.items()],
        }
        with self.work.new_file(f"{self.work.export.name}/{MANIFEST}") as stream:
            stream.write((to_json(with_checksum(manifest), indent=1) + "\n").encode())
        return {
            "tables": len(tables),
            "bytes": sum(table["bytes"] for table in tables),
            "trained_bytes": sum(table["trained_bytes"] for table in tables),
            "outputs": {name: output["bytes"] for name, output in outputs.items()},
        }

    def missing(self, world_size: int) -> str | None:
        """How much room the disk lacks for what is still to be written; None where it has enough."""
        free = shutil.disk_usage(self.work.root).free
        needed = self._needed(world_size)
        if needed <= free:
            return None
        return f"it needs {needed:,} bytes and {free:,} are free: {needed - free:,} bytes are missing"

    def _needed(self, world_size: int) -> int:
        row_bytes = {
            table.name: sum(output.encoding.row_bytes(table.embedding_dim) for output in self.outputs)
            for table in self.source.tables.values()
        }
        around = _BYTES_OF_A_FILE * len(self.outputs)
        needed = sum(unit.rows * row_bytes[unit.table] + around for unit in self.unfinished())
        if self.gather:  # what is joined lies there twice until it is done
            sizes = [self.source.tables[name].num_embeddings * row_bytes[name] + around for name in self.unjoined()]
            needed += sum(sorted(sizes)[-world_size:])
        dense = sum(4 * torch.Size(shape).numel() for shape in self._dense_shapes.values())
        if self._package is not None:
            needed += 2 * served_bytes(self.served, self._package.encoding)
        return needed + (dense + around) * len(self.outputs)

    def _finish_output(
        self, output: Output, records: Sequence[dict[str, Any]], dense: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        directory = f"{self.work.export.name}/{output.directory}"
        file = f"_dense{output.format.suffix}"
        with self.work.new_file(f"{directory}/{file}") as stream:
            last = output.format.write(stream, file, 0, dense)
        files = {f"{directory}/{file}": stream.checksum.entry()}
        pieces = [Piece.from_dict(each) for record in records for each in record["pieces"][output.name]] + last
        index, content = output.format.index(pieces)
        with self.work.new_file(f"{directory}/{index}") as stream:
            stream.write(content)
        files[f"{directory}/{index}"] = stream.checksum.entry()
        for record in records:
            files |= {path: entry for path, entry in record["files"].items() if path.startswith(f"{directory}/")}
        described = {
            "directory": output.directory,
            "format": output.format.suffix.removeprefix("."),
            "encoding": output.encoding.name,
            "table_bytes": served_bytes(self.served, output.encoding),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "files": {path.removeprefix(f"{directory}/"): entry for path, entry in sorted(files.items())},
        }
        if output.encoding.is_quantised and self._serving is not None:
            described["plan"] = plan_serving(self.served, output.encoding, self._serving)
        return described

    def _finish_package(
        self, of_tables: Output, outputs: Mapping[str, Any], dense: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Make the package from the finished output that holds its tables, since they are computed once."""
        directory = self.work.export / PACKAGE
        with self.work.writing():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            tables = self.work.export / of_tables.directory
            files = outputs[of_tables.name]["files"]
            with open_output(tables, files, outputs[of_tables.name]["format"]) as stored:
                write_package(directory, self.served, of_tables.encoding, stored, dense)
            found = {path.name: _synced_entry(path) for path in sorted(directory.iterdir())}
        return {
            "directory": PACKAGE,
            "format": "torchscript",
            "encoding": of_tables.encoding.name,
            "table_bytes": served_bytes(self.served, of_tables.encoding),
            "bytes": sum(entry["bytes"] for entry in found.values()),
            "files": found,
        }

    def _describe_tables(self) -> list[dict[str, Any]]:
        return [
            {
                "name": table.name,
                "state_name": table.state_name,
                "num_embeddings": table.num_embeddings,
                "hidden_dim": table.hidden_dim,
                "embedding_dim": table.embedding_dim,
                "shape": [table.num_embeddings, table.embedding_dim],
                "dtype": "float32",
                "trained_bytes": table.stored_bytes,
                "bytes": 4 * table.num_embeddings * table.embedding_dim,
            }
            for table in self.source.tables.values()
        ]

    @cached_property
    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        tables = {table.state_name for table in self.source.tables.values()}
        state = build_dlrm(self.served, torch.device("meta")).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tables}

    def _load_dense(self) -> dict[str, torch.Tensor]:
        dense = {name: self.source.load_dense(name) for name in self._dense_shapes}
        for name, tensor in dense.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self.source.files.location}: {name!r} holds values that are not finite")
        return dense


def _synced_entry(path: Path) -> dict[str, Any]:
    """Checksums of a file whose bytes are on the disk."""
    checksum = Checksum()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            checksum.update(block)
    return checksum.entry()


def _joined(table: str) -> str:
    return f"joined.{table}"  # units' names hold no dot


def _versions() -> dict[str, str]:
    return {
        "mlet_dist": __version__,
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
        "fbgemm_gpu": fbgemm_gpu.__version__,
    }


def _metrics(summary: Any) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name.endswith(("_auc", "_logloss", "_rows"))}
