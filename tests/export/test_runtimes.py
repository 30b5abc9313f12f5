"""The runtimes of ONNX artifacts against transformers, and the factory that finds them."""

import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import export.runtimes
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible, MissingExtra, UnusableModel
from compression.evaluation.generation import generate
from compression.evaluation.runtime import Runtime
from export.genai import GenaiSettings, export_genai
from export.onnx import OnnxSettings, export_onnx
from export.runtimes import installed_runtimes, open_runtime, runtime_name
from tests.tiny import tiny_checkpoint, tiny_windows

PROMPT = tiny_windows(1, 9, seed=3)
NEW_TOKENS = 24


def greedy(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """Greedy decoding without a cache."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose end-of-text token is the third that it generates, so that a runtime which stops there is found out."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", tied=False)
    end = greedy(load_model(path), PROMPT, 3)[-1]
    for name in ("config.json", "generation_config.json"):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | {"eos_token_id": end}))
    return path


@pytest.fixture(scope="module")
def artifacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("artifacts")
    export_onnx(source, out / "onnx", OnnxSettings(dtype="float32"), context=Context())
    export_genai(source, out / "genai", GenaiSettings(precision="fp32"), context=Context())
    return {"onnxruntime": out / "onnx", "onnxruntime-genai": out / "genai"}


@pytest.fixture(params=["onnxruntime", "onnxruntime-genai"])
def runtime(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Runtime:
    opened = open_runtime(artifacts[request.param], threads=1)
    assert opened.name == request.param and opened.version == metadata.version(request.param)
    assert opened.max_length == 128 and opened.timed
    return opened


def test_logits_at_every_position(runtime: Runtime, source: Path) -> None:
    ids = tiny_windows(3, 20)
    ids[0, 15:] = 1  # padded on the right, with the padding token
    ids[1, 4] = 1  # which text may hold too
    found = runtime.logits(ids.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, load_model(source)(ids).logits.detach().numpy(), atol=1e-4)


def test_greedy_generation_goes_past_end_of_text(runtime: Runtime, source: Path) -> None:
    generation = generate(runtime, PROMPT[0].tolist(), NEW_TOKENS)
    expected = greedy(load_model(source), PROMPT, NEW_TOKENS)
    end = json.loads((source / "config.json").read_text())["eos_token_id"]
    assert end in expected[:-1]
    assert generation.tokens == expected
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0
    assert generate(runtime, PROMPT[0].tolist(), 1).tokens == expected[:1]


def test_fills_the_context_and_no_more(runtime: Runtime) -> None:
    prompt = tiny_windows(1, 120)[0].tolist()
    assert len(generate(runtime, prompt, 8).tokens) == 8
    with pytest.raises(Incompatible, match="120 \\+ 9 tokens"):
        generate(runtime, prompt, 9)


def test_repeats_itself_exactly(runtime: Runtime) -> None:
    ids = tiny_windows(2, 16).numpy()
    np.testing.assert_array_equal(runtime.logits(ids), runtime.logits(ids))


def test_closes(runtime: Runtime) -> None:
    runtime.close()
    with pytest.raises(AttributeError):
        runtime.logits(tiny_windows(1, 4).numpy())


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["model.gguf"], "llama.cpp"),
        (["genai_config.json", "model.onnx"], "onnxruntime-genai"),
        (["model.onnx", "config.json"], "onnxruntime"),
        (["model.xml", "model.bin", "config.json"], "openvino"),
        (["model.pte", "config.json"], "executorch"),
        (["config.json", "model-00001-of-00002.safetensors"], "transformers"),
    ],
)
def test_recognizes_directories(files: list[str], name: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert runtime_name(tmp_path) == name


@pytest.mark.parametrize("files", [[], ["config.json"], ["model.safetensors"]])
def test_refuses_other_directories(files: list[str], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UnusableModel, match="neither a checkpoint") as error:
        open_runtime(tmp_path, threads=1)
    assert error.value.key == "model"
    with pytest.raises(UnusableModel):
        runtime_name(tmp_path / "missing")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "genai_config.json").touch()
    package = dataclasses.replace(export.runtimes.PACKAGES["onnxruntime-genai"], distribution="no-such-package")
    monkeypatch.setitem(export.runtimes.PACKAGES, "onnxruntime-genai", package)
    assert installed_runtimes()["onnxruntime-genai"] is None
    with pytest.raises(MissingExtra, match=r"no-such-package.*edgepress\[genai\]"):
        open_runtime(tmp_path, threads=1)


def test_installed_versions() -> None:
    assert installed_runtimes()["transformers"] == metadata.version("transformers")
    assert {"transformers", "onnxruntime", "onnxruntime-genai", "llama.cpp"} <= set(installed_runtimes())


def test_planning_imports_nothing_heavy() -> None:
    code = """
import importlib, sys
heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "openvino", "llama_cpp", "gguf"}
for kind in ("executorch", "genai", "gguf", "onnx", "openvino"):
    importlib.import_module(f"tasks.kinds.export_{kind}")
print(sorted((heavy | {"numpy"}) & set(sys.modules)))
import export.runtimes
print(sorted(heavy & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n[]\n"
