import os
from pathlib import Path

import pytest

from tests.docker.images import copy_context, install_worker


@pytest.fixture(scope="session")
def worker_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the worker's image has in /opt/edgepress: installed from what its build sees, not the one of the tests."""
    context = tmp_path_factory.mktemp("context")
    copy_context(context)
    install_worker(context, context / "venv", dict(os.environ))
    return context / "venv"
