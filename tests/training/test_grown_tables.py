"""Runs that begin with the tables of yesterday where vocabularies have grown: old rows by id, new ones drawn."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_formats import criteo
from mlet_dist.data.prepare.splits import whole
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.export.source import Tables
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.helpers.mlet_command import ROOT, error_line
from tests.helpers.raw_logs import make_raw_lines, raw_bytes
from tests.helpers.rows_by_id import row_orders
from tests.helpers.stored_vectors import expected_vectors, vectors_of
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

pytestmark = pytest.mark.e2e

STEPS = 9
BATCH = 24
MODEL = (
    f"data.batch_size={BATCH}",
    "data.eval_batch_size=250",
    "model.bottom_mlp=[16]",
    "model.top_mlp=[16]",
    "model.embedding_dim=8",
    "model.hidden_dim=16",
)
_WIDTHS = ("model.hidden_dim=16", "compression.widths=[16,8,4]")
KINDS = {
    "two layers": (),
    "single": ("model.hidden_dim=null",),
    "small ones single": ("model.single_layer_up_to=16",),
    "static": ("compression.policy=static", "compression.budget=0.9", *_WIDTHS),
    "shared": ("compression.policy=static", "compression.budget=0.3", *_WIDTHS),
    "adaptive": ("compression.policy=adaptive", "compression.budget=1.2", "compression.interval=4", *_WIDTHS),
}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the data sets ``1`` and ``2``, which has grown from it, of the same kind of rows."""
    path = tmp_path_factory.mktemp("days")
    for day, distinct in ((1, 12), (2, 60)):
        (path / f"raw{day}").write_bytes(raw_bytes(make_raw_lines(400, seed=day, distinct=distinct)))
    spec = criteo(1, whole("train"))
    prepare(spec, [path / "raw1"], path / "1")
    prepare(spec, [path / "raw2"], path / "2", like=LikeDataset.open(str(path / "1"), grows=True))
    return path


class Yesterday:
    """Runs of the first day, trained when they are first asked for."""

    def __init__(self, ranks: Ranks, days: Path) -> None:
        self._ranks, self._days = ranks, days

    def __call__(self, kind: str, optimizer: str) -> Path:
        path = self._days / f"{kind}-{optimizer}"
        if not path.exists():
            own = (f"data.path={self._days / '1'}", f"run.dir={path}", f"train.max_steps={STEPS}")
            train_in_ranks(self._ranks, 2, *self.settings(kind, optimizer), *own)
        return path

    def settings(self, kind: str, optimizer: str) -> tuple[str, ...]:
        return (*MODEL, f"optimizer.name={optimizer}", "optimizer.learning_rate=0.05", *KINDS[kind])


@pytest.fixture(scope="module")
def yesterday(ranks: Ranks, days: Path) -> Yesterday:
    return Yesterday(ranks, days)


def tomorrow(days: Path, run: Path, *more: str) -> tuple[str, ...]:
    """Return settings of a run on the second day whose only step changes no weight but those that are zero."""
    return (f"data.path={days / '2'}", f"run.dir={run}", "train.max_steps=1", "optimizer.learning_rate=1e-30", *more)


def by_id(run: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, and those with a value or state for each row of W1 in the order of ids."""
    found = tensors(run, step, scratch)
    orders = row_orders(ModelSpec.load(run / "model.json"))
    for name, tensor in found.items():
        order = next((order for state_name, order in orders.items() if state_name in name), None)
        if order is not None and tensor.dim() and len(tensor) == order.num_rows:
            found[name] = order.from_stored(tensor)
        if name.startswith("/model/"):
            found[name] = torch.where(found[name].abs() < 1e-20, 0.0, found[name])
    return found


def first_batch(days: Path) -> dict[str, set[int]]:
    data = days / "2"
    [part] = DatasetSchema.load(data).parts["train"]
    rows = pq.read_table(data / part.path).slice(0, BATCH)
    return {name: set(rows[name].to_pylist()) for name in rows.column_names if name.startswith("C")}


@pytest.mark.parametrize(
    ("kind", "optimizer", "size", "setting"),
    [
        ("two layers", "adagrad", 2, "train.initial_weights"),
        ("two layers", "adagrad", 3, "train.resume"),
        ("two layers", "adam", 1, "train.resume"),
        ("single", "rowwise_adagrad", 2, "train.resume"),
        ("single", "rowwise_adagrad", 1, "train.initial_weights"),
    ],
)
def test_old_rows_keep_every_bit_and_new_ones_are_those_of_a_fresh_run(
    kind: str, optimizer: str, size: int, setting: str, yesterday: Yesterday, days: Path, ranks: Ranks, tmp_path: Path
) -> None:
    run, new, fresh = yesterday(kind, optimizer), tmp_path / "new", tmp_path / "fresh"
    settings = yesterday.settings(kind, optimizer)
    summary = train_in_ranks(ranks, size, *settings, *tomorrow(days, new, f"{setting}={run}"))
    assert (summary["first_step"], summary["steps"]) == (0, 1)
    train_in_ranks(ranks, 1, *settings, *tomorrow(days, fresh))
    before, after, drawn = by_id(run, STEPS, tmp_path), by_id(new, 1, tmp_path), by_id(fresh, 1, tmp_path)
    seen = first_batch(days)
    grown = states = 0
    assert before.keys() == after.keys()
    for name, old in before.items():
        found = after[name]
        table = name.rpartition(".weight")[0].rpartition(".")[2]
        is_rows = f"{TABLES_PREFIX}embedding_bags." in name and found.dim()
        if name.startswith("/model/"):
            assert torch.equal(found[: len(old)] if is_rows else found, old), name
            if is_rows:
                assert torch.equal(found[len(old) :], drawn[name][len(old) :]), name
                grown += len(found) > len(old)
        elif setting == "train.resume" and is_rows:
            unseen = torch.tensor([row not in seen[table] for row in range(len(found))])
            assert torch.equal(found[: len(old)][unseen[: len(old)]], old[unseen[: len(old)]]), name
            assert not found[len(old) :][unseen[len(old) :]].any(), name
            states += bool(old.any())
    assert grown > 10
    assert states > 10 or setting != "train.resume"


@pytest.mark.parametrize(
    ("before", "after", "size", "setting"),
    [
        ("two layers", "static", 2, "train.initial_weights"),
        ("static", "two layers", 3, "train.resume"),
        ("shared", "two layers", 1, "train.resume"),
        ("two layers", "shared", 2, "train.resume"),
        ("adaptive", "adaptive", 2, "train.resume"),
        ("adaptive", "two layers", 1, "train.initial_weights"),
        ("small ones single", "small ones single", 2, "train.initial_weights"),
        ("small ones single", "small ones single", 1, "train.resume"),
        ("two layers", "small ones single", 1, "train.initial_weights"),
    ],
)
def test_rows_with_compression_keep_their_vectors(
    before: str, after: str, size: int, setting: str, yesterday: Yesterday, days: Path, ranks: Ranks, tmp_path: Path
) -> None:
    run, new = yesterday(before, "adagrad"), tmp_path / "new"
    train_in_ranks(ranks, size, *yesterday.settings(after, "adagrad"), *tomorrow(days, new, f"{setting}={run}"))
    exact = shared = 0
    with Tables.open(run) as source, Tables.open(new) as target:
        for name, table in target.tables.items():
            vectors, found = vectors_of(source.tables[name]), vectors_of(table)
            assert len(found) >= len(vectors)
            assert bool(found.isfinite().all())
            scale = float(vectors.abs().max())
            known = found[: len(vectors)]
            torch.testing.assert_close(known, expected_vectors(vectors, table), rtol=1e-5, atol=2e-6 * scale)
            exact += int(((known - vectors).abs() <= 1e-5 * scale).all(dim=1).sum())
            shared += table.shared_row is not None and table.shared_row < len(vectors)
    assert exact > 20
    assert shared or after != "shared"


def test_a_killed_day_goes_on_from_its_own_checkpoint(
    yesterday: Yesterday, days: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """The command names yesterday's run still, and ends with the bits of a day without interruption."""
    own = (f"data.path={days / '2'}", "train.max_steps=8", "train.checkpoint_every=4", "train.keep_last=9")
    settings = (*yesterday.settings("two layers", "adagrad"), *own)
    start = f"train.resume={yesterday('two layers', 'adagrad')}"
    whole = train_in_ranks(ranks, 2, *settings, f"run.dir={tmp_path / 'whole'}", start)
    killed = stopped_after(4, tmp_path / "whole", tmp_path / "killed")
    again = train_in_ranks(ranks, 2, *settings, f"run.dir={killed}", start)
    assert (whole["first_step"], again["first_step"]) == (0, 4)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert records(killed) == records(tmp_path / "whole")


def test_tables_never_shrink_and_unrelated_ones_are_refused(
    yesterday: Yesterday, days: Path, ranks: Ranks, tmp_path: Path
) -> None:
    settings = yesterday.settings("two layers", "adagrad")
    run, new = yesterday("two layers", "adagrad"), tmp_path / "new"
    train_in_ranks(ranks, 1, *settings, *tomorrow(days, new, f"train.initial_weights={run}"))
    back = ("train", ROOT / "configs" / "criteo_kaggle.yaml", *settings, *tomorrow(days, tmp_path / "back"))
    prepare(criteo(1, whole("train")), [days / "raw2"], tmp_path / "apart")
    for setting in ("train.initial_weights", "train.resume"):
        line = error_line(*back, f"data.path={days / '1'}", f"{setting}={new}")
        assert ": table 'C" in line
        assert "rows there, and only" in line
        assert "prepare that data with --like and the data set of the weights" in line
        line = error_line(*back, f"data.path={tmp_path / 'apart'}", f"{setting}={new}")
        assert "of sparse feature C" in line
        assert "belong to another vocabulary" in line
    assert not (tmp_path / "back" / "config.yaml").exists()
