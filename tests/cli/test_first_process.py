"""SIGTERM to `mlet` as the first process of a container: never lost, never a traceback, and the code of the docs."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.helpers.first_process import make_inputs, namespaces_work, strike

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not namespaces_work(), reason="this kernel lets this user make no process namespaces"),
]

SEED = int(os.environ.get("MLET_SIGNAL_SEED", time.time_ns() % 2**32))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("command", ["train", "train --nproc", "train --export", "export", "verify", "prepare"])
def test_sigterm_at_random_moments(command: str, inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """One moment while the process starts and one while it works; `tests/helpers/first_process.py` tries 50."""
    print(f"MLET_SIGNAL_SEED={SEED}")  # shown where the test fails
    dice = random.Random(f"{SEED} {command}")
    for number, moment in enumerate((dice.uniform(0, 0.5), dice.uniform(0.5, 5))):
        end, problem = strike(command, moment, tmp_path / f"{number}", inputs)
        assert not problem, (moment, end)
