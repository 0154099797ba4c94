import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mlet_dist.storage import open_filesystem
from tests.helpers.mlet_command import mlet_json
from tests.helpers.ranks import RankPool
from tests.helpers.s3_server import S3Bucket, S3Server, s3_server

_LONGEST = (
    "tests/sweep/test_run_sweep.py",
    "tests/cluster/test_restarts.py",
    "tests/training/test_refitted_tables.py",
    "tests/cluster/test_rank_faults.py",
    "tests/training/test_resume.py",
    "tests/training/test_dense_arithmetic.py",
    "tests/export/serving/test_package.py",
    "tests/embeddings/sharded/test_module.py",
    "tests/training/test_non_finite_guard.py",
    "tests/training/test_kills.py",
    "tests/training/test_faults.py",
    "tests/training/test_adaptive_training.py",
    "tests/training/test_compression.py",
    "tests/cluster/test_launcher.py",
    "tests/training/test_run_on_s3.py",
    "tests/training/test_validation.py",
    "tests/training/test_trainer.py",
    "tests/launch/test_local.py",
    "tests/export/spectrum/test_spectrum.py",
    "tests/export/test_budget.py",
    "tests/cluster/test_elastic.py",
)
"""The files that take more than a minute. They come first, since all workers would wait for one that began last."""


def pytest_configure() -> None:
    # torch reads it when it is imported. The second thread of a worker would spin on a core that another worker needs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_xdist_auto_num_workers() -> int:
    """Run one worker more than there are CPUs, since tests wait for processes and timers; each takes a few GB."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., RankPool]]:
    """``ranks(2).run(function, *args)`` calls a function in 2 gloo ranks, which live until the tests end.

    ``ranks(4, 2)`` are 4 ranks on 2 simulated nodes.
    """
    pools: dict[tuple[int, int], RankPool] = {}

    def pool(world_size: int, local_world_size: int | None = None) -> RankPool:
        key = world_size, local_world_size or world_size
        return pools.setdefault(key, RankPool(*key))

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    """A bucket of its own for each test, on one server that the test's environment names."""
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://bucket-{uuid4().hex}"
    files, name = open_filesystem(url)
    files.mkdir(name)
    yield S3Bucket(url, files, _s3_server)
    _s3_server.set_faults()


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of two ranks, its data set, and the result that `mlet train --json` printed."""

    path: Path
    data: Path
    overrides: tuple[str, ...]
    result: dict[str, Any]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 6,001 rows; the smallest tables have 4 rows, the largest 300."""
    out = tmp_path_factory.mktemp("small") / "data"
    mlet_json("synth", "--out", out, "--rows", 6001, "--num-embeddings", 300)
    return out


@pytest.fixture(scope="session")
def small_model(small_data: Path) -> tuple[str, ...]:
    """Overrides of a config for a model that trains in seconds; it takes 57 of the 75 steps of an epoch."""
    return (
        f"data.path={small_data}",
        "data.batch_size=64",
        "data.eval_batch_size=250",
        "model.bottom_mlp=[16]",
        "model.top_mlp=[16]",
        "model.embedding_dim=4",
        "model.hidden_dim=12",
        "train.max_steps=57",
        "train.log_every=20",
    )


@pytest.fixture(scope="session")
def trained(small_data: Path, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of two ranks with Adagrad, so that the checkpoint contains every kind of optimizer state."""
    path = tmp_path_factory.mktemp("trained") / "run"
    overrides = (*small_model, "optimizer.name=adagrad", "optimizer.learning_rate=0.05")
    config = Path(__file__).parents[1] / "configs" / "criteo_kaggle.yaml"
    result = mlet_json("train", config, *overrides, f"run.dir={path}", "--nproc", 2)
    return TrainedRun(path, small_data, overrides, result)
