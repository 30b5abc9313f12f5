"""What `inspect` reads from files, against the model that transformers opens and the files themselves."""

import json
from pathlib import Path

import pytest
import torch

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import UnusableModel
from export.contents import Contents, read_contents
from export.genai import GenaiSettings, export_genai
from export.gguf import GgufSettings, export_gguf
from export.onnx import OnnxSettings, export_onnx
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", tied=False, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def matrices(source: Path) -> int:
    """Parameters of all matrices."""
    return sum(p.numel() for p in load_model(source).parameters() if p.ndim == 2)


def bytes_by_type(contents: Contents) -> dict[str, int]:
    return {t.type: t.bytes for t in contents.tensors}


def test_checkpoint(source: Path, matrices: int) -> None:
    contents = read_contents(source)
    assert contents.parameters == matrices and contents.settings == {"layout": "dense"}
    assert bytes_by_type(contents) == {"BF16": 2 * sum(p.numel() for p in load_model(source).parameters())}
    assert contents.architecture == {
        "architecture": "LlamaForCausalLM", "layers": 2, "hidden size": 64, "MLP width": 128, "heads": 4, "KV heads": 2, "head width": 16,
        "vocabulary": 320, "context": 128, "tied embeddings": False,
    }  # fmt: skip


def test_gguf_says_the_same_as_its_checkpoint(source: Path, matrices: int, tmp_path: Path) -> None:
    export_gguf(source, tmp_path, GgufSettings(type="q8_0", embedding_type="q8_0", head_type="q8_0"), context=Context())
    contents = read_contents(tmp_path / "model.gguf")
    norms = sum(p.numel() for p in load_model(source).parameters() if p.ndim == 1)
    assert contents.parameters == matrices + norms
    assert bytes_by_type(contents) == {"Q8_0": matrices * 34 // 32, "F32": 4 * norms}
    assert contents.bits_per_weight == pytest.approx(8 * (matrices * 34 / 32 + 4 * norms) / (matrices + norms))
    known = read_contents(source).architecture
    assert contents.architecture == {key: known[key] for key in contents.architecture if key != "architecture"} | {"architecture": "llama"}
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:-5000])
    with pytest.raises(UnusableModel, match="truncated or damaged"):
        read_contents(tmp_path)


@pytest.mark.slow
def test_onnx(source: Path, matrices: int, tmp_path: Path) -> None:
    export_onnx(source, tmp_path, OnnxSettings(dtype="int8"), context=Context())
    contents = read_contents(tmp_path)
    assert contents.parameters == matrices
    layers = sum(p.numel() for n, p in load_model(source).named_parameters() if p.ndim == 2 and "layers" in n)
    assert bytes_by_type(contents)["INT8"] >= layers and "MatMulInteger" in contents.settings["quantizing operators"]
    assert contents.architecture == read_contents(source).architecture
    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-50])
    with pytest.raises(UnusableModel, match="truncated or damaged"):
        read_contents(tmp_path)


def test_genai_counts_packed_codes(source: Path, matrices: int, tmp_path: Path) -> None:
    export_genai(source, tmp_path, GenaiSettings(precision="int4"), context=Context())
    contents = read_contents(tmp_path)
    assert contents.parameters == matrices
    layers = sum(p.numel() for n, p in load_model(source).named_parameters() if p.ndim == 2 and "layers" in n)
    assert bytes_by_type(contents)["UINT8"] >= layers // 2  # two codes a byte
    assert contents.settings["quantizing operators"] == ["MatMulNBits"]
    assert contents.architecture["layers"] == json.loads((source / "config.json").read_text())["num_hidden_layers"]
