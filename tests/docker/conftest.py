from pathlib import Path

import pytest

from tests.docker.images import copy_context, make_worker


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build of the worker's image sees of the checkout."""
    folder = tmp_path_factory.mktemp("context")
    copy_context(folder)
    return folder


@pytest.fixture(scope="session")
def worker_environment(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the worker's image has in /opt/edgepress."""
    environment = tmp_path_factory.mktemp("worker") / "venv"
    make_worker(context, environment)
    return environment
