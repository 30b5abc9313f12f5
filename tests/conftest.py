from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama checkpoint with a tokenizer. Read only: copy before changing it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")
