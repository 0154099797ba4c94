"""Write a finished run to disk without training, for benchmarks and tests of code that reads checkpoints."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mlet_dist.checkpoint.load import MODEL_KEY
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.writer import ChecksumStream
from mlet_dist.config.config_file import Config, save_config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import DataConfig, RunConfig, TrainConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.row_order import ROW_ORDER, SPREAD
from mlet_dist.export.formats.dcp import DcpFormat
from mlet_dist.export.formats.tensor_shards import TensorShard
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training.run_directory import RunDirectory

Rows = Callable[[str, int, int, int], torch.Tensor]
"""Maps the name of a table, the first row, and the numbers of rows and columns to values."""


def random_rows(name: str, start: int, rows: int, columns: int) -> torch.Tensor:
    """Return normal values that depend on the arguments only."""
    seed = zlib.crc32(f"{name} {start} {rows} {columns}".encode())
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def make_run(
    path: Path,
    tables: Mapping[str, int],
    model: ModelConfig,
    shards: int,
    rows_dtype: torch.dtype = torch.float32,
    rows: Rows = random_rows,
    checkpoint_dir: str | None = None,
    spread: bool = False,
) -> ModelSpec:
    """Write a finished run with one checkpoint, as ``shards`` ranks would. At most one shard of a table is in memory.

    Args:
        path: The directory of the run.
        tables: The number of rows of each table, by name.
        model: The config of the model.
        shards: The number of ranks that the checkpoint seems to come from.
        rows_dtype: The dtype of W1.
        rows: Returns the values of each shard of W1, and of each W2 as the table ``<name>.projection``.
        checkpoint_dir: A directory or URL for the checkpoint; by default, it is in the run.
        spread: Whether the rows are stored rows, as those of `mlet train` are, rather than rows by id.
    """
    spec = ModelSpec(
        model,
        tuple(f"I{index}" for index in range(1, 14)),
        tuple(SparseFeature(name, rows) for name, rows in tables.items()),
        seed=0,
    )
    run = RunDirectory(path)
    config = Config(
        data=DataConfig(path="nowhere"),
        model=model,
        train=TrainConfig(checkpoint_dir=checkpoint_dir),
        run=RunConfig(dir=str(path)),
    )
    path.mkdir(parents=True)
    save_config(config, run.config)
    spec.save(run.model)
    checkpoint = run.checkpoint_store(config).checkpoint(1)
    checkpoint.begin()
    form, shard_entries, files = DcpFormat(), list[TensorShard](), {}
    for shard in range(shards):
        file = f"__{shard}_0.distcp"
        with checkpoint.open_new(file) as raw:
            stream = ChecksumStream(raw)
            for name, total in tables.items():
                size = -(-total // shards)
                start, stop = min(shard * size, total), min((shard + 1) * size, total)
                if start < stop:
                    columns = model.hidden_dim or model.embedding_dim
                    state = f"{MODEL_KEY}.{TABLES_PREFIX}embedding_bags.{name}.weight"
                    values = rows(name, start, stop - start, columns).to(rows_dtype)
                    shard_entries += form.write(stream, file, start, {state: values})
                    del values
            if shard == 0:
                shard_entries += form.write(stream, file, 0, _replicated(spec, rows))
        files[file] = stream.checksum.entry()
    index, content = form.index(shard_entries)
    with checkpoint.open_new(index) as raw:
        stream = ChecksumStream(raw)
        stream.write(content)
    files[index] = stream.checksum.entry()
    checkpoint.finish(Manifest(checkpoint.step, files, {ROW_ORDER: SPREAD} if spread else {}))
    run.finish({"test_auc": 0.5, "test_logloss": 0.7, "test_rows": 1})
    return spec


def _replicated(spec: ModelSpec, rows: Rows) -> dict[str, torch.Tensor]:
    """Return W2 of each table and the dense layers, by their names in the checkpoint."""
    state = build_training_model(spec, torch.device("meta")).state_dict()
    found = {}
    for name, tensor in state.items():
        if ".projections." in name:
            found[name] = rows(f"{name.split('.')[-2]}.projection", 0, *tensor.shape)
        elif not name.startswith(TABLES_PREFIX):
            found[name] = tensor.clone()
    return {f"{MODEL_KEY}.{name}": tensor for name, tensor in found.items()}
