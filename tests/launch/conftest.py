from pathlib import Path

import pytest

from tests.helpers.torchx_cli import registered


@pytest.fixture(scope="session")
def torchx_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `torchx` knows the resources of launch/resources.py."""
    return registered(Path(tmp_path_factory.mktemp("entry points")))
