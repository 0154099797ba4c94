"""Assemble an export from its finished units: which are missing, joined files, indexes, the package, the manifest."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.manifest_entries import describe_tables, installed_versions, metrics_of, synced_entry
from mlet_dist.export.collapse.output_groups import OutputGroup, group_outputs
from mlet_dist.export.collapse.units import UNIT_BYTES, Unit, record_name
from mlet_dist.export.collapse.work_directory import WorkDirectory, join_files
from mlet_dist.export.export_directory import FORMAT_VERSION, MANIFEST, PACKAGE, PREPROCESSING, SIZE, describe_tensor
from mlet_dist.export.formats.tensor_shards import TensorShard
from mlet_dist.export.outputs import Output, open_output
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.export.serving.package import check_can_be_packaged, check_fits, write_package
from mlet_dist.export.serving.quantised import Serving, plan_serving
from mlet_dist.export.serving.raw_inputs import write_preprocessing
from mlet_dist.export.serving.served_model import spec_of_layout
from mlet_dist.export.sized_model import FORMAT, Size, SizedSource
from mlet_dist.export.source import ModelSource
from mlet_dist.formatting import to_json, with_checksum
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec

_FILE_OVERHEAD_BYTES = 4096  # approximately, for the format's header, the record and the file system


class Assembly:
    """An export that is being written.

    Args:
        source: the model.
        outputs: the outputs to write.
        gather: write one file per table.
        work: the directory in which the export is written.
        package: the output of ``outputs`` whose tables the serving package contains; None for no package.
        serving: the devices for which the serving of quantised outputs is planned; None for no plan.

    Attributes:
        groups: of the outputs, by name.
        tables: what is read for them, by group and name of the TorchRec table.
        units: all units, by group and table.
        directories: output name -> directory of the units' files within ``work``.
    """

    def __init__(
        self,
        source: ModelSource,
        outputs: Sequence[Output],
        gather: bool,
        work: WorkDirectory,
        package: Output | None = None,
        serving: Serving | None = None,
    ) -> None:
        self.source, self.outputs, self.gather, self.work = source, outputs, gather, work
        self._package, self._serving = package, serving
        self.groups = group_outputs(source.tables, outputs)
        self.tables = {
            (group.name, name): table for group in self.groups.values() for name, table in group.served.tables.items()
        }
        self.units = [unit for group in self.groups.values() for unit in group.units]
        parent = "parts" if gather else work.export.name
        self.directories = {output.name: f"{parent}/{output.directory}" for output in outputs}

    @property
    def _size(self) -> Size | None:
        return self.source.size if isinstance(self.source, SizedSource) else None

    @property
    def served(self) -> ModelSpec:
        """The exported model, whose tables have a single layer."""
        return dataclasses.replace(self.source.spec.with_hidden_dim(None), row_ranges={}, adaptive={})

    def job(self, device: torch.device) -> dict[str, Any]:
        """Return everything that the bytes of finished units depend on."""
        return {
            "format_version": FORMAT_VERSION,
            "versions": installed_versions(),
            "checkpoint": self.source.digest,
            **({"size": self._size.to_dict(), "size_sha256": self._size.digest} if self._size else {}),
            "outputs": [output.name for output in self.outputs],
            "package": self._package and self._package.name,
            "serving": self._serving and dataclasses.asdict(self._serving),
            "gather": self.gather,
            "unit_bytes": UNIT_BYTES,
            "device": device.type,
        }

    def check(self) -> None:
        """Raise UserError if the outputs cannot be made from this model, before any of them is written."""
        for output in self.outputs:
            for table in self.served.tables:
                output.encoding.check(table.embedding_dim)
            if output.encoding.is_quantised and self._serving is not None:
                self._plan(output, self._serving)
        if self._package is not None:
            check_fits(self._layout(self._package), self._package.encoding)
            if self.served.model.builder is not None:
                check_can_be_packaged(self.served, self._package.encoding)
        for name, shape in self._dense_shapes.items():
            self.source.check_shape(name, shape)
        for group in self.groups.values():
            self._check_finite(group.served.tensors)

    def unfinished(self) -> list[Unit]:
        """Return the units that remain to be run."""
        finished = self.work.finished()
        return [unit for unit in self.units if not {unit.record, _joined(unit.group, unit.table)} & finished]

    def unjoined(self) -> list[tuple[str, str]]:
        """Return groups and tables whose units remain to be joined; all units must be finished."""
        finished = self.work.finished()
        return [(group, name) for group, name in self.tables if _joined(group, name) not in finished]

    def join(self, group: str, table: str) -> None:
        """Join the files of a table's units to one file per output of a group, and remove them.

        Raises:
            UserError: a file cannot be read or written, or is damaged.
        """
        units = [unit for unit in self.units if (unit.group, unit.table) == (group, table)]
        records = [self.work.read_record(unit.record) for unit in units]
        entries = {file: entry for record in records for file, entry in record["files"].items()}
        shards: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for output in self.groups[group].outputs:
            of_units = [TensorShard.from_dict(each) for record in records for each in record["pieces"][output.name]]
            directory = self.directories[output.name]
            target = f"{self.work.export.name}/{output.directory}/{table}{output.format.suffix}"
            joined, files[target] = join_files(self.work, output.format, directory, of_units, entries, target)
            shards[output.name] = [shard.to_dict() for shard in joined]
        self.work.record(_joined(group, table), {"files": files, "pieces": shards})
        for file in entries:
            (self.work.root / file).unlink(missing_ok=True)

    def finish(self, preprocessing: LikeDataset | None = None) -> dict[str, Any]:
        """Write the dense layers, the indexes, the package and the manifest. All units must be finished and joined.

        Args:
            preprocessing: what makes the model's inputs from raw rows, for the export to carry; None for nothing.

        Returns:
            The result of ``export_run`` without ``out``.
        """
        dense = self._load_dense()
        outputs = {output.name: self._finish_output(output, dense) for output in self.outputs}
        if self._package is not None:
            outputs[PACKAGE] = self._finish_package(self._package, outputs, dense)
        tables = describe_tables(self.source)
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "versions": installed_versions(),
            "run": {
                "path": str(self.source.path),
                "checkpoint": self.source.checkpoint,
                "checkpoint_sha256": self.source.digest,
                **metrics_of(self.source.summary),
            },
            "config": self.source.config,
            "model": self.served.to_dict(),
            "outputs": outputs,
            "tables": tables,
            "dense": [describe_tensor(name, tensor) for name, tensor in dense.items()],
        }
        if self._size is not None:
            manifest[SIZE] = self._finish_size(self._size)
        if preprocessing is not None:
            manifest[PREPROCESSING] = self._finish_preprocessing(preprocessing)
        with self.work.new_file(f"{self.work.export.name}/{MANIFEST}") as stream:
            stream.write((to_json(with_checksum(manifest), indent=1) + "\n").encode())
        return {
            "tables": len(tables),
            "bytes": sum(table["bytes"] for table in tables),
            "trained_bytes": sum(table["trained_bytes"] for table in tables),
            "outputs": {name: output["bytes"] for name, output in outputs.items()},
            "served_bytes": {name: output["table_bytes"] for name, output in outputs.items()},
            **({"kept_ids_bytes": kept_ids} if (kept_ids := _kept_ids_bytes(outputs)) else {}),
            **({"preprocessing_bytes": manifest[PREPROCESSING]["bytes"]} if PREPROCESSING in manifest else {}),
        }

    def missing_space(self, world_size: int) -> str | None:
        """Return a message on how much disk space is missing for the rest of the export; None if there is enough."""
        free = shutil.disk_usage(self.work.root).free
        needed = self._needed_bytes(world_size)
        if needed <= free:
            return None
        return f"it needs {needed:,} bytes and {free:,} are free: {needed - free:,} bytes are missing"

    def _needed_bytes(self, world_size: int) -> int:
        row_bytes = {
            (group.name, name): sum(output.encoding.row_bytes(table.embedding_dim) for output in group.outputs)
            for group in self.groups.values()
            for name, table in group.served.tables.items()
        }
        overhead = _FILE_OVERHEAD_BYTES * len(self.outputs)
        needed = sum(unit.rows * row_bytes[unit.group, unit.table] + overhead for unit in self.unfinished())
        if self.gather:  # each rank keeps one table twice while it joins its files
            sizes = [self.tables[key].num_embeddings * row_bytes[key] + overhead for key in self.unjoined()]
            needed += sum(sorted(sizes)[-world_size:])
        needed += sum(
            len(group.outputs) * tensor.nbytes
            for group in self.groups.values()
            for tensor in group.served.tensors.values()
        )
        dense = sum(4 * torch.Size(shape).numel() for shape in self._dense_shapes.values())
        if self._package is not None:
            needed += 2 * self._layout(self._package).table_bytes(self._package.encoding)
        return needed + (dense + overhead) * len(self.outputs)

    def _group(self, output: Output) -> OutputGroup:
        return next(group for group in self.groups.values() if output in group.outputs)

    def _layout(self, output: Output) -> ServedLayout:
        return self._group(output).served.layout

    def _records(self, output: Output) -> list[dict[str, Any]]:
        group = self._group(output)
        if self.gather:
            return [self.work.read_record(_joined(group.name, name)) for name in group.served.tables]
        return [self.work.read_record(unit.record) for unit in self.units if unit.group == group.name]

    def _plan(self, output: Output, serving: Serving) -> dict[str, Any]:
        if output.form == "mixed":
            raise UserError(
                f"--serving-ranks {serving.ranks}: {output.name} is served in one process; remove it from the outputs, "
                "or export it by itself"
            )
        return plan_serving(spec_of_layout(self.served, self._layout(output)), output.encoding, serving)

    def _finish_output(self, output: Output, dense: dict[str, torch.Tensor]) -> dict[str, Any]:
        records, layout = self._records(output), self._layout(output)
        directory = f"{self.work.export.name}/{output.directory}"
        file = f"_dense{output.format.suffix}"
        with self.work.new_file(f"{directory}/{file}") as stream:
            of_dense = output.format.write(stream, file, 0, dense | dict(self._group(output).served.tensors))
        files = {f"{directory}/{file}": stream.checksum.entry()}
        of_tables = [TensorShard.from_dict(each) for record in records for each in record["pieces"][output.name]]
        index, content = output.format.index(of_tables + of_dense)
        with self.work.new_file(f"{directory}/{index}") as stream:
            stream.write(content)
        files[f"{directory}/{index}"] = stream.checksum.entry()
        for record in records:
            files |= {path: entry for path, entry in record["files"].items() if path.startswith(f"{directory}/")}
        described = {
            "directory": output.directory,
            "format": output.format.suffix.removeprefix("."),
            "encoding": output.encoding.name,
            "table_bytes": layout.table_bytes(output.encoding),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "files": {path.removeprefix(f"{directory}/"): entry for path, entry in sorted(files.items())},
        }
        if output.encoding.is_quantised and self._serving is not None:
            described["plan"] = self._plan(output, self._serving)
        return described | self._describe_form(output)

    def _finish_package(
        self, output: Output, outputs: Mapping[str, Any], dense: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Write the package with the tables of a finished output, which are not computed again."""
        directory = self.work.export / PACKAGE
        with self.work.writing():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            tables = self.work.export / output.directory
            files = outputs[output.name]["files"]
            with open_output(tables, files, outputs[output.name]["format"]) as stored:
                write_package(directory, self.served, output.encoding, stored, dense, self._layout(output))
            found = {path.name: synced_entry(path) for path in sorted(directory.iterdir())}
        return {
            "directory": PACKAGE,
            "format": "torchscript",
            "encoding": output.encoding.name,
            "table_bytes": self._layout(output).table_bytes(output.encoding),
            "bytes": sum(entry["bytes"] for entry in found.values()),
            "files": found,
            **self._describe_form(output),
        }

    def _finish_size(self, size: Size) -> dict[str, Any]:
        """Write what a later `mlet verify` makes the model of this size from."""
        if not size.tensors:
            return size.to_dict()
        name = f"tables{FORMAT.suffix}"
        with self.work.new_file(f"{self.work.export.name}/{SIZE}/{name}") as stream:
            FORMAT.write(stream, name, 0, size.tensors)
        return {**size.to_dict(), "directory": SIZE, "files": {name: stream.checksum.entry()}}

    def _finish_preprocessing(self, preprocessing: LikeDataset) -> dict[str, Any]:
        directory = f"{self.work.export.name}/{PREPROCESSING}"
        with self.work.writing():
            shutil.rmtree(self.work.root / directory, ignore_errors=True)
            names = list(write_preprocessing(preprocessing, lambda name: self.work.new_file(f"{directory}/{name}")))
            files = {name: synced_entry(self.work.root / directory / name) for name in sorted(names)}
        return {"directory": PREPROCESSING, "bytes": sum(entry["bytes"] for entry in files.values()), "files": files}

    def _describe_form(self, output: Output) -> dict[str, Any]:
        """Return what the manifest says of an output that does not hold all rows with d columns."""
        if output.form == "all":
            return {}
        tensors, layout = self._group(output).served.tensors, self._layout(output)
        ids = [table.kept_ids for table in layout.tables.values() if table.kept_ids is not None]
        return {"layout": layout.to_dict(), "kept_ids_bytes": sum(tensors[name].nbytes for name in ids)}

    @cached_property
    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        tables = {table.state_name for table in self.source.tables.values()}
        state = build_training_model(self.served, torch.device("meta")).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tables}

    def _load_dense(self) -> dict[str, torch.Tensor]:
        dense = {name: self.source.load_dense(name) for name in self._dense_shapes}
        self._check_finite(dense)
        return dense

    def _check_finite(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self.source.files.location}: {name!r} holds values that are not finite")


def _joined(group: str, table: str) -> str:
    return f"joined.{record_name(group, table)}"  # names of units contain no dot before that of their group


def _kept_ids_bytes(outputs: Mapping[str, Any]) -> dict[str, int]:
    return {name: entry["kept_ids_bytes"] for name, entry in outputs.items() if entry.get("kept_ids_bytes")}
