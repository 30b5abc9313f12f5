"""What an artifact's own files may say of the base model."""

import dataclasses

import pytest

from compression.origin import Origin
from tasks.artifact import origin_of
from tasks.base import Base, open_base


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return open_base("embedded", None, None, tmp_path_factory.mktemp("cache"))


def test_hub_model_is_named(embedded: Base) -> None:
    base = dataclasses.replace(embedded, source="org/Model-1B", revision="c0ffee", license="mit")
    assert origin_of(base) == Origin("Model-1B", "org", "https://huggingface.co/org/Model-1B", "c0ffee", "mit")


def test_artifact_has_no_local_path(embedded: Base) -> None:
    base = dataclasses.replace(embedded, source="/home/someone/secret", content="1" * 64, license="unknown")
    assert origin_of(base) == Origin("local model 111111111111")
