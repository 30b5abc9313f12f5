"""Every family that llama.cpp runs: its logits against transformers', at lengths beyond every window, in float and rounded types."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.context import Context
from export.gguf import GgufSettings, check_gguf, export_gguf
from export.gguf.architectures import ARCHITECTURES
from tests.export.test_gguf import LLAMA3, YARN, divergence, write
from tests.tiny import tiny_checkpoint

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, every bias": ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tied": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"heads": 8, "kv_heads": 2}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn without its original length": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "smollm3": ("smollm3", {"layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
    "olmo2": ("olmo2", {"tied": False}),
    "olmo2, tied": ("olmo2", {}),
    "gemma3": ("gemma3_text", {"layers": 4}),
    "gemma3, its own pattern": ("gemma3_text", {"layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    "gemma3, scaled rope, capped": ("gemma3_text", {"rope_parameters": GEMMA_ROPE, "final_logit_softcapping": 8.0}),
    "phi3": ("phi3", {}),
    "phi3, untied, part of a head": (
        "phi3", {"tied": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
}  # fmt: skip


def telling_checkpoint(path: Path, family: str, **settings: Any) -> Path:
    """A tiny checkpoint whose norms and biases are random: they start at 1 and 0, where a lost one would not show."""
    source = tiny_checkpoint(path, family, **settings)
    weights, middle = load_file(source / "model.safetensors"), 1 - FAMILIES[family].norm_offset
    generator = torch.Generator().manual_seed(1)
    save_file(
        {n: torch.randn(t.shape, generator=generator) * 0.3 + middle if t.ndim == 1 else t for n, t in weights.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    return source


def test_every_architecture_is_among_the_shapes() -> None:
    assert {family for family, _ in SHAPES.values()} == set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path: Path, shape: str) -> None:
    family, settings = SHAPES[shape]
    source = telling_checkpoint(tmp_path / "model", family, **settings)
    if shape == "phi3, longrope":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    check_gguf(open_checkpoint(source), GgufSettings(type="f32"))
    write(source, tmp_path / "out", "f32")
    # A lost bias or a wrong row order gives more than 0.1. llama.cpp's GELU is a table of float16 values.
    assert divergence(source, tmp_path / "out", 96) < (1e-6 if family == "gemma3_text" else 1e-9)


@pytest.mark.parametrize("family", ["smollm3", "olmo2", "gemma3_text", "phi3"])
def test_q8_0_of_the_newer_families_stays_close(tmp_path: Path, family: str) -> None:
    settings = {"layers": 4, "no_rope_layers": [1, 1, 1, 0]} if family == "smollm3" else {}
    source = telling_checkpoint(tmp_path / "model", family, **settings)
    write(source, tmp_path / "out", "q8_0")
    assert divergence(source, tmp_path / "out", 96) < 1e-2


@pytest.mark.parametrize(
    ("family", "settings"), [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}), ("phi3", {})]
)
def test_where_llama_cpp_does_not_slide_the_context_is_cut(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, sliding_window=64, **settings)
    warnings: list[str] = []
    export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context(warn=warnings.append))
    name = ARCHITECTURES[family].name
    assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields[f"{name}.context_length"].contents() == 64
    assert any("128 to the window of 64" in warning for warning in warnings)


def test_where_it_slides_the_window_is_written(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "gemma3_text", layers=3)
    write(source, tmp_path / "out", "f16")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["gemma3.context_length"].contents() == 128 and fields["gemma3.attention.sliding_window"].contents() == 8
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False, True]
    assert (fields["gemma3.rope.freq_base"].contents(), fields["gemma3.rope.freq_base_swa"].contents()) == (1e6, 1e4)


def test_longrope_says_up_to_where_it_is_right(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=256)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    warnings: list[str] = []
    export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context(warn=warnings.append))
    assert "the file says 256 of 1024" in warnings[0]


def test_a_tied_head_is_written_where_llama_cpp_needs_one(tmp_path: Path) -> None:
    write(tiny_checkpoint(tmp_path / "model", "olmo2"), tmp_path / "out", "f32")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert (found["output.weight"] == found["token_embd.weight"]).all()
