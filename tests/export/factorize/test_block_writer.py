"""A checkpoint that is written in blocks can be read by torch and by mlet_dist, and its checksums are right."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mlet_dist.checkpoint.load import latest_finished
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import DcpFiles
from mlet_dist.errors import UserError
from mlet_dist.export.factorize.run_factorize import BlockWriter

TABLE = torch.arange(70.0).reshape(14, 5)
REST = {"a.bias": torch.arange(3), "a.scalar": torch.tensor(2.5), "half": torch.ones(2, 2, dtype=torch.float16)}


def _write(store: Path) -> tuple[Checkpoint, Manifest]:
    writer = BlockWriter(CheckpointStore(store).checkpoint(0))
    with writer.file("table") as file:
        file.add("tables.t", TABLE.split([4, 4, 5, 1]))
    with writer.file("rest") as file:
        for name, tensor in REST.items():
            file.add(name, [tensor])
    writer.finish({"note": 1})
    return latest_finished(CheckpointStore(store))


def test_torch_and_mlet_dist_read_what_was_written(tmp_path: Path) -> None:
    checkpoint, manifest = _write(tmp_path / "store")
    assert manifest.about == {"note": 1}
    assert [manifest.find_damage(name, checkpoint.open) for name in manifest.files] == 3 * [None]
    with DcpFiles(checkpoint.location, checkpoint.open, manifest.files) as files:
        rows = torch.empty(7, 5)
        files.read_rows("model.tables.t", 3, rows)
        assert torch.equal(rows, TABLE[3:10])
        assert all(torch.equal(files.load(f"model.{name}"), tensor) for name, tensor in REST.items())

    state = {"model": {"tables.t": torch.zeros(14, 5), "half": torch.zeros(2, 2, dtype=torch.float16)}}
    dcp.load(state, checkpoint_id=checkpoint.location, no_dist=True)
    assert torch.equal(state["model"]["tables.t"], TABLE)
    assert torch.equal(state["model"]["half"], REST["half"])
    dcp_to_torch_save(checkpoint.location, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"model.{name}": tensor.tolist() for name, tensor in {"tables.t": TABLE, **REST}.items()
    }


def test_a_block_that_is_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    writer = BlockWriter(CheckpointStore(tmp_path / "store").checkpoint(0))
    with writer.file("table") as file:
        file.add("t", torch.zeros(100, 1000).split(10))
    assert (tmp_path / "store" / "step-00000000" / "table.distcp").stat().st_size < 1.1 * 400_000


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    writer = BlockWriter(CheckpointStore(tmp_path / "store").checkpoint(0))
    with writer.file("table") as file:
        file.add("t", [TABLE])
    with pytest.raises(UserError, match="no complete checkpoint"):
        latest_finished(CheckpointStore(tmp_path / "store"))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    writer = BlockWriter(CheckpointStore(tmp_path / "store").checkpoint(0))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"step-00000000/table\.distcp: cannot be written: .*File too large"),
            writer.file("table") as file,
        ):
            file.add("t", torch.zeros(100, 1000).split(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
