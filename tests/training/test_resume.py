"""A resumed run is bitwise identical on as many ranks; on others it sees the same rows; state loads in any sharding."""

import json
import math
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import latest_complete
from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.config.config_file import Config, load_config
from mlet_dist.embeddings.row_order import ROW_ORDER, SPREAD
from mlet_dist.training.snapshot import rank_info, restore, state_to_save
from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankFailed
from tests.helpers.small_run import SETTINGS, training_of
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"

pytestmark = pytest.mark.multirank

STEPS = 56
_ONLY_TINY = ("sharding.data_parallel_up_to_mb=0",)  # tables of fewer rows than ranks cannot be sharded by rows


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings of nearly two epochs of 50 batches, with checkpoints in both."""
    return (
        *small_model,
        "data.batch_size=96",
        f"train.max_steps={STEPS}",
        "train.epochs=2",
        "train.checkpoint_every=14",
        "train.keep_last=9",
        "data.shuffle=true",
        "data.shuffle_buffer=960",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.05",
    )


@pytest.fixture(scope="module")
def whole(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("resume") / "whole"
    train_in_ranks(ranks, 2, *settings, f"run.dir={run}")
    return run


def fingerprint(run: Path) -> str:
    found: str = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return found


@pytest.mark.parametrize("step", [14, 42])
@pytest.mark.parametrize("pipelined", ["true", "false"])
def test_a_resumed_run_is_bitwise_identical_in_both_loops(
    ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path, step: int, pipelined: str
) -> None:
    run = stopped_after(step, whole, tmp_path / "run")
    found = train_in_ranks(ranks, 2, *settings, f"run.dir={run}", f"train.pipelined={pipelined}")
    assert found["first_step"] == step
    assert found["weights_sha256"] == fingerprint(whole)
    assert records(run) == records(whole)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == [f"step-{each:08d}" for each in range(step, STEPS + 1, 14)]


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, ("optimizer.name=sgd", "optimizer.warmup_steps=20", "optimizer.decay=cosine")),
        (2, ("optimizer.name=adam", "optimizer.learning_rate=0.01")),
        (3, ("optimizer.name=rowwise_adagrad",)),
        (2, ("optimizer.name=adagrad", "sharding.sharding_types=[data_parallel]")),
    ],
    ids=["sgd", "adam", "rowwise_adagrad of 3", "data_parallel"],
)
def test_a_resumed_run_is_bitwise_identical_with_every_optimizer(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, world_size: int, changes: tuple[str, ...]
) -> None:
    settings = (*settings, *changes, "train.max_steps=28")  # one epoch: the data are those of the test above
    once = train_in_ranks(ranks, world_size, *settings, f"run.dir={tmp_path / 'once'}")
    run = stopped_after(14, tmp_path / "once", tmp_path / "run")
    again = train_in_ranks(ranks, world_size, *settings, f"run.dir={run}")
    assert again["first_step"] == 14
    assert again["weights_sha256"] == once["weights_sha256"]
    assert records(run) == records(tmp_path / "once")


def _draw_before_and_after_restoring(config: Config, location: str) -> tuple[list[float], list[float]]:
    """Random numbers after a checkpoint was saved, and after it was loaded."""
    training, _ = training_of(config, 10)
    torch.manual_seed(100 + dist.get_rank())
    torch.rand(3)
    store = CheckpointStore(location)
    with CheckpointSaver(store, timedelta(seconds=60), 1, None) as saver:
        saver.save(
            1, state_to_save(training), {**rank_info(training), ROW_ORDER: SPREAD, "skipped": 4, "passed_over": [2]}
        )
        saver.wait()
    drawn = torch.rand(5).tolist()
    torch.manual_seed(0)
    found = latest_complete(store)
    assert found is not None
    restore(training, found)
    assert (training.step, training.skipped, training.excluded_steps) == (1, 4, {2})
    return drawn, torch.rand(5).tolist()


def test_each_rank_restores_its_random_state(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Training on a CPU does not depend on the random state, so weights cannot show it."""
    config = load_config(CONFIG, (f"data.path={small_data}", f"run.dir={tmp_path}", *SETTINGS))
    (before, after), (other_before, other_after) = ranks(2).run(
        _draw_before_and_after_restoring, config, str(tmp_path / "store")
    )
    assert after == before
    assert other_after == other_before != before


def test_a_run_resumed_on_other_ranks_sees_the_same_rows(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (*settings, "optimizer.name=sgd")  # Adagrad makes a step of any gradient, be it a rounding error
    whole = tmp_path / "whole"
    train_in_ranks(ranks, 2, *settings, f"run.dir={whole}")
    expected = tensors(whole, STEPS, tmp_path)
    for world_size in (1, 3):
        run = stopped_after(14, whole, tmp_path / f"on {world_size}")
        assert train_in_ranks(ranks, world_size, *settings, f"run.dir={run}")["first_step"] == 14
        found = tensors(run, STEPS, tmp_path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
        for before, after in zip(records(whole), records(run), strict=True):
            assert after.keys() == before.keys()
            assert all(math.isclose(after[key], before[key], rel_tol=1e-5) for key in before if key != "split")


@pytest.fixture(scope="module")
def saved_on_four(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks, row_wise with unique rows."""
    run = tmp_path_factory.mktemp("four") / "four"
    row_wise = (*_ONLY_TINY, "sharding.sharding_types=[row_wise,data_parallel]", "sharding.exchange=unique_rows")
    train_in_ranks(ranks, 4, *settings, *row_wise, "train.max_steps=14", f"run.dir={run}")
    types = [table["sharding_type"] for table in json.loads((run / "plan.json").read_text())["tables"]]
    assert types.count("row_wise") > 10
    return run


@pytest.mark.parametrize(
    ("world_size", "changes", "kind"),
    [
        ((1,), (), None),
        ((2,), ("sharding.exchange=reduce_scatter",), None),
        ((3,), ("sharding.sharding_types=[table_wise]",), "table_wise"),
        ((4, 2), (*_ONLY_TINY, "sharding.sharding_types=[table_row_wise,data_parallel]"), "table_row_wise"),
        ((4,), ("sharding.sharding_types=[data_parallel]",), "data_parallel"),
    ],
    ids=["1", "2 reduce_scatter", "3 table_wise", "4 table_row_wise", "4 data_parallel"],
)
def test_weights_and_optimizer_state_load_unchanged_in_any_sharding(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, world_size: tuple[int, ...], changes: tuple[str, ...],
    kind: str | None, saved_on_four: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    arguments = (*settings, *changes, "train.max_steps=14", f"run.dir={run}", f"train.resume={saved_on_four}")
    train_in_ranks(ranks, world_size, *arguments)
    expected, found = tensors(saved_on_four, 14, tmp_path), tensors(run, 14, tmp_path)
    assert found.keys() == expected.keys()
    assert sum("/optimizer/" in name for name in expected) > 50
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    plan = json.loads((run / "plan.json").read_text())
    assert plan["world_size"] == world_size[0]
    if kind is not None:
        assert [table["sharding_type"] for table in plan["tables"]].count(kind) > 10


def refusal(ranks: Ranks, world_size: int, *overrides: str) -> str:
    with pytest.raises(RankFailed) as failed:
        train_in_ranks(ranks, world_size, *overrides)
    lines = [line for line in str(failed.value).splitlines() if "UserError: " in line]
    assert lines, failed.value
    return lines[0].partition("UserError: ")[2]


def test_a_run_with_other_settings_is_refused_and_from_a_path_learning_rates_may_change(
    ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    run = stopped_after(42, whole, tmp_path / "run")
    message = refusal(ranks, 1, *settings, "model.hidden_dim=16", "optimizer.learning_rate=0.01", f"run.dir={run}")
    assert "step-00000042 was saved with other settings: " in message
    assert "model.hidden_dim was 12, is 16; optimizer.learning_rate was 0.05, is 0.01; " in message
    assert "run.overwrite=true" in message
    with_less = (*settings, f"run.dir={run}", "train.max_steps=41")
    assert "was saved after step 42, and train.max_steps is 41; use 42 or more" in refusal(ranks, 1, *with_less)
    other = (f"run.dir={tmp_path / 'other'}", f"train.resume={run}", "optimizer.learning_rate=0.01")
    assert train_in_ranks(ranks, 1, *settings, *other)["first_step"] == 42
    assert not (run / "summary.json").exists()


def test_a_resume_path_is_used_until_the_run_has_its_own_checkpoints(
    ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    checkpoint = whole / "checkpoints" / "step-00000014"
    run = tmp_path / "run"
    arguments = (*settings, f"run.dir={run}", f"train.resume={checkpoint}")
    first = train_in_ranks(ranks, 1, *arguments)
    assert first["first_step"] == 14
    later = stopped_after(42, run, tmp_path / "later")  # the same command again, after it was killed
    again = train_in_ranks(ranks, 1, *settings, f"run.dir={later}", f"train.resume={checkpoint}")
    assert again["first_step"] == 42
    assert again["weights_sha256"] == first["weights_sha256"]
    # A checkpoint of the run's own is gone back to, and what came after it is dropped.
    (run / "summary.json").unlink()
    (tmp_path / "link").symlink_to(run)
    back = train_in_ranks(
        ranks, 1, *settings, f"run.dir={run}", f"train.resume={tmp_path / 'link' / 'checkpoints' / 'step-00000028'}"
    )
    assert back["first_step"] == 28
    assert back["weights_sha256"] == first["weights_sha256"]
    assert records(run) == records(later)
    for path, message in {
        tmp_path: f"train.resume {tmp_path}: no complete checkpoint is there; it must be a checkpoint, or a run that "
        "has one, or auto or never",
        tmp_path / "gone": f"train.resume {tmp_path / 'gone'}: does not exist; it must be a checkpoint",
        run / "checkpoints" / "step-00000001": "step-00000001: does not exist; its directory has step-",
    }.items():
        assert message in refusal(ranks, 1, *settings, f"run.dir={tmp_path / 'x'}", f"train.resume={path}")


def test_never_requires_an_empty_directory_and_overwrite_starts_over(
    ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    run = stopped_after(42, whole, tmp_path / "run")
    short = (*settings, f"run.dir={run}", "train.max_steps=2")
    assert "train.resume is never" in refusal(ranks, 1, *short, "train.resume=never")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000042"]
    assert train_in_ranks(ranks, 1, *short, "train.resume=never", "run.overwrite=true")["first_step"] == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    run = stopped_after(28, whole, tmp_path / "run")
    stopped_after(42, whole, tmp_path / "newer")
    (tmp_path / "newer" / "checkpoints" / "step-00000042").rename(run / "checkpoints" / "step-00000042")
    damaged = run / "checkpoints" / "step-00000042" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    found = train_in_ranks(ranks, 2, *settings, f"run.dir={run}")
    assert found["first_step"] == 28
    assert found["weights_sha256"] == fingerprint(whole)
    for path in (run / "checkpoints").glob("*/.metadata"):
        path.write_bytes(path.read_bytes()[:-1])
    (run / "summary.json").unlink()
    message = refusal(ranks, 2, *settings, f"run.dir={run}")
    assert "no checkpoint is complete" in message
    assert all(f"step-{step:08d}: .metadata has " in message for step in (28, 42, STEPS))


class _Created:
    """What creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_damaged_index_is_not_unpickled(ranks: Ranks, settings: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    run = stopped_after(28, whole, tmp_path / "run")
    stopped_after(42, whole, tmp_path / "newer")
    (tmp_path / "newer" / "checkpoints" / "step-00000042").rename(run / "checkpoints" / "step-00000042")
    index = run / "checkpoints" / "step-00000042" / ".metadata"
    index.write_bytes(pickle.dumps(_Created(tmp_path / "unpickled")).ljust(index.stat().st_size))  # of the same size
    found = train_in_ranks(ranks, 2, *settings, f"run.dir={run}")
    assert found["first_step"] == 28
    assert not (tmp_path / "unpickled").exists()
