from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.mlet_command import mlet_json


@pytest.fixture(scope="session")
def exported(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of ``trained`` with all outputs, planned for two CPU devices."""
    out = tmp_path_factory.mktemp("exported") / "export"
    outputs = ("dcp", "safetensors", "fp16", "int8", "int4", "package")
    result = mlet_json(
        "export", trained.path, "--out", out, "--outputs", *outputs, "--serving-ranks", 2, "--serving-device", "cpu"
    )
    assert result["out"] == str(out)
    assert set(result["outputs"]) == set(outputs)
    return out
