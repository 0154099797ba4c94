"""Checkpoints of format version 4, whose rows are stored by id, are exported, evaluated and resumed as before."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex

from mlet_dist.checkpoint import manifest as manifests
from mlet_dist.checkpoint.load import read_metadata
from mlet_dist.checkpoint.manifest import Checksum, Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.embeddings.row_order import ROW_ORDER
from mlet_dist.models.spec import ModelSpec
from tests.conftest import TrainedRun
from tests.helpers.export_units import contents
from tests.helpers.mlet_command import mlet_json
from tests.helpers.ranks import RankFailed
from tests.helpers.rows_by_id import row_orders
from tests.helpers.train_in_ranks import Ranks, stopped_after, tensors, train_in_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.multirank]

STEP = 57


@pytest.fixture(scope="module")
def by_id(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run as an earlier version would have saved it."""
    folder = tmp_path_factory.mktemp("by-id")
    run = shutil.copytree(trained.path, folder / "run")
    directory = run / "checkpoints" / f"step-{STEP:08d}"
    checkpoint = Checkpoint.at(str(directory))
    assert checkpoint is not None
    saved = checkpoint.manifest()
    assert saved.about[ROW_ORDER] == "spread"
    dcp_to_torch_save(directory, folder / "state.pt")
    state = torch.load(folder / "state.pt", weights_only=False)
    moved = 0
    for name, order in row_orders(ModelSpec.load(run / "model.json")).items():
        by_id = order.from_stored(state["model"][name])
        moved += int(not torch.equal(by_id, state["model"][name]))
        state["model"][name] = by_id
        state["optimizer"][name]["sum"] = order.from_stored(state["optimizer"][name]["sum"])
    assert moved > 20
    shutil.rmtree(directory)
    # A file for each tensor: in a small run, a checksum of one file would otherwise be that of all tensors.
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, single_file_per_rank=False), no_dist=True)
    files = {}
    for path in directory.iterdir():
        checksum = Checksum()
        checksum.update(path.read_bytes())
        files[path.name] = checksum.entry()
    about = {key: value for key, value in saved.about.items() if key != ROW_ORDER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "FORMAT_VERSION", 4)
        (directory / manifests.MANIFEST).write_bytes(Manifest(STEP, files, about).render())
    return run


def test_its_export_and_its_metrics_are_the_same(trained: TrainedRun, by_id: Path, tmp_path: Path) -> None:
    for name, run in (("new", trained.path), ("old", by_id)):
        mlet_json("export", run, "--out", tmp_path / name, "--outputs", "dcp")
    assert contents(tmp_path / "old" / "model") == contents(tmp_path / "new" / "model")
    assert mlet_json("verify", tmp_path / "old", "--run", by_id, "--data", trained.data)["ok"] is True
    old, new = (mlet_json("evaluate", run, "--data", trained.data) for run in (by_id, trained.path))
    assert (old["auc"], old["logloss"]) == (new["auc"], new["logloss"])


def test_a_run_resumes_from_it_on_any_number_of_ranks(
    trained: TrainedRun, by_id: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Resumed after its last step, a run takes no step: what it saves is what it began with."""
    expected = tensors(trained.path, STEP, tmp_path)
    for world_size in (1, 4):
        new = tmp_path / f"new-{world_size}"
        train_in_ranks(ranks, world_size, *trained.overrides, f"run.dir={new}", f"train.resume={by_id}")
        found = tensors(new, STEP, tmp_path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    own = stopped_after(STEP, by_id, tmp_path / "own")
    result = train_in_ranks(ranks, 2, *trained.overrides, f"run.dir={own}")
    assert result["test_logloss"] == trained.result["test_logloss"]


@pytest.mark.parametrize(
    "name", ["over_arch.model.0._mlp.0._linear.weight", "sparse_arch.embedding_bag_collection.embedding_bags.C3.weight"]
)
def test_every_rank_refuses_it_if_dense_layers_or_rows_are_damaged(
    trained: TrainedRun, by_id: Path, ranks: Ranks, tmp_path: Path, name: str
) -> None:
    own = stopped_after(STEP, by_id, tmp_path / "own")
    directory = own / "checkpoints" / f"step-{STEP:08d}"
    part = read_metadata(directory).storage_data[MetadataIndex(f"model.{name}", torch.Size([0, 0]))]
    path = directory / part.relative_path
    content = bytearray(path.read_bytes())
    content[part.offset + part.length // 2] ^= 4
    path.write_bytes(content)
    on_one_rank = "sharding.tables={C3: {sharding_types: [table_wise]}}"
    with pytest.raises(RankFailed) as failed:
        train_in_ranks(ranks, 2, *trained.overrides, f"run.dir={own}", on_one_rank)
    assert str(failed.value).count(f"UserError: {own / 'checkpoints'}: no checkpoint is complete") == 2
