from pathlib import Path

import pytest

from tests.command import mlet_json
from tests.conftest import TrainedRun


@pytest.fixture(scope="session")
def exported(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of ``trained``."""
    out = tmp_path_factory.mktemp("exported") / "export"
    result = mlet_json("export", trained.path, "--out", out)
    assert result["out"] == str(out)
    return out
