from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.mlet_command import mlet_json


@pytest.fixture(scope="session")
def exported(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of ``trained``, in every form, planned for two devices of a CPU."""
    out = tmp_path_factory.mktemp("exported") / "export"
    forms = ("dcp", "safetensors", "fp16", "int8", "int4", "package")
    result = mlet_json(
        "export", trained.path, "--out", out, "--outputs", *forms, "--serving-ranks", 2, "--serving-device", "cpu"
    )
    assert result["out"] == str(out)
    assert set(result["outputs"]) == set(forms)
    return out
