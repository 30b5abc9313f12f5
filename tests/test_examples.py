"""The example script runs from end to end."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from compression.data import DataSpec
from compression.distillation import DistillationSettings

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


@pytest.fixture
def example() -> ModuleType:
    """docs/examples/compress.py as a module."""
    spec = importlib.util.spec_from_file_location("compress_example", EXAMPLES / "compress.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_compresses_and_measures(example: ModuleType, checkpoint: Path, tmp_path: Path):
    data = DataSpec(
        text="embedded",
        questions="embedded",
        length=64,
        train_documents=64,
        calibration_windows=4,
        evaluation_windows=2,
        evaluation_questions=4,
    )
    training = DistillationSettings(steps=2, batch_size=2)
    figures = example.compress(checkpoint, data, training, tmp_path, keep=0.5)
    assert list(figures) == ["base", "pruned", "distilled", "gptq", "gguf"]
    assert all(math.isfinite(found["perplexity"]) and 0 <= found["accuracy"] <= 1 for found in figures.values())
    assert figures["base"]["kl_to_base"] == pytest.approx(0, abs=1e-9)
    sizes = [found["size_mb"] for found in figures.values()]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert figures["gguf"]["kl_to_base"] == pytest.approx(figures["gptq"]["kl_to_base"], rel=0.05), "codes are carried"
    assert figures["gguf"]["tokens_per_second"] > 0
