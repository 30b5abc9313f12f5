"""GGUF files against the official reader, llama.cpp's logits against transformers, and what is refused."""

import dataclasses
import filecmp
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible, MissingExtra, UnusableModel
from compression.origin import Origin
from export.gguf import GgufSettings, check_gguf, export_gguf
from export.gguf.architectures import ARCHITECTURES
from export.gguf.tensors import Types
from export.gguf.tokenizer import read_vocabulary
from export.gguf.types import QUANTIZED
from export.gguf.writer import write_model
from export.runtimes.llamacpp import LlamaCppRuntime
from tests.export.judging import of_type
from tests.tiny import tiny_checkpoint, tiny_windows


def write(source: Path, out: Path, type: str) -> None:
    """The file without check and proof, which cost a process each time."""
    out.mkdir()
    checkpoint = open_checkpoint(source)
    write_model(out / "model.gguf", checkpoint, read_vocabulary(source, checkpoint.vocab_size), Types(type, type, type), Context())


def exact_contexts(patch: pytest.MonkeyPatch) -> None:
    """Let llama.cpp keep and multiply keys and values in float32: with its defaults (float16) a right file gives a KL around 1e-6."""
    defaults = llama_cpp.llama_context_default_params

    def exact() -> Any:
        parameters = defaults()
        parameters.type_k = parameters.type_v = int(gguf.GGMLQuantizationType.F32)
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return parameters

    patch.setattr(llama_cpp, "llama_context_default_params", exact)


def divergence(reference: Path, artifact: Path, length: int = 48) -> float:
    """Mean KL of llama.cpp's next-token distribution from transformers', in float64."""
    windows = tiny_windows(2, length)
    with torch.no_grad():
        expected = load_model(reference)(windows).logits.double().log_softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        exact_contexts(patch)
        runtime = LlamaCppRuntime(artifact, threads=1)
    found = torch.from_numpy(runtime.logits(windows.numpy())).double().log_softmax(-1)
    runtime.close()
    return float((expected.exp() * (expected - found)).sum(-1).mean())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize(("type", "bound"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2)])
def test_narrower_types_stay_close(checkpoint: Path, tmp_path: Path, type: str, bound: float) -> None:
    write(checkpoint, tmp_path / "out", type)
    assert divergence(checkpoint, tmp_path / "out") < bound


def test_official_reader_finds_the_weights_once(checkpoint: Path, tmp_path: Path) -> None:
    metrics = export_gguf(checkpoint, tmp_path, GgufSettings(type="f32"), context=Context())
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {t.name: t for t in reader.tensors}
    weights = load_file(checkpoint / "model.safetensors")
    assert len(found) == len(weights) and "output.weight" not in found
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
        ("output_norm", "model.norm"),
    ):
        np.testing.assert_array_equal(found[f"{theirs}.weight"].data, weights[f"{ours}.weight"].numpy())
    assert reader.fields["llama.context_length"].contents() == 128
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert metrics["bits_per_weight"] == 32


def test_rows_of_q_turn_in_neighbouring_pairs(checkpoint: Path, tmp_path: Path) -> None:
    write(checkpoint, tmp_path / "out", "f32")
    (found,) = [t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "blk.0.attn_q.weight"]
    weight = load_file(checkpoint / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].numpy()
    for head in range(4):
        for i in range(8):
            np.testing.assert_array_equal(found[head * 16 + 2 * i], weight[head * 16 + i])
            np.testing.assert_array_equal(found[head * 16 + 2 * i + 1], weight[head * 16 + i + 8])


def test_q8_0_is_within_half_a_step(checkpoint: Path, tmp_path: Path) -> None:
    export_gguf(checkpoint, tmp_path, GgufSettings(type="q8_0", embedding_type="f16"), context=Context())
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert found["token_embd.weight"].tensor_type.name == "F16" and found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    weight = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy().reshape(-1, 32).astype(np.float64)
    stored = gguf.dequantize(found["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 32)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(stored - weight) <= step * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("type", ["q4_0", "q4_k_m"])
def test_llama_cpp_quantizes(tmp_path: Path, type: str) -> None:
    source = tiny_checkpoint(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    metrics = export_gguf(source, tmp_path / "out", GgufSettings(type=type, embedding_type="q8_0"), context=Context())
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.ffn_gate.weight"] == {"q4_0": "Q4_0", "q4_k_m": "Q4_K"}[type]
    assert metrics["fallback_tensors"] == 0 and 4.5 < metrics["bits_per_weight"] < 6.5
    assert divergence(source, tmp_path / "out") < 1


def test_k_quants_say_where_rows_are_too_narrow(checkpoint: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    metrics = export_gguf(checkpoint, tmp_path, GgufSettings(type="q4_k_m"), context=Context(warn=warnings.append))
    assert metrics["fallback_tensors"] == 14
    assert "multiples of 256" in warnings[0] and "1 ffn_down (rows of 128) in q5_0" in warnings[0]  # the other one is meant to be q6_k


def test_every_quantizer_type_has_a_file_type() -> None:
    assert all(f"MOSTLY_{type.upper()}" in gguf.LlamaFileType.__members__ for type in QUANTIZED)


def test_same_bytes_every_time(checkpoint: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        write(checkpoint, tmp_path / out, "q8_0")
    assert filecmp.cmp(tmp_path / "a" / "model.gguf", tmp_path / "b" / "model.gguf", shallow=False)


def types_in(out: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}


@pytest.mark.parametrize(("type", "found"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q4_k_m", "Q5_0")])
def test_rows_between_blocks_stay_in_f16(tmp_path: Path, type: str, found: str) -> None:
    source, warnings = tiny_checkpoint(tmp_path / "model", intermediate=80), list[str]()
    metrics = export_gguf(source, tmp_path / "out", GgufSettings(type=type), context=Context(warn=warnings.append))
    types = types_in(tmp_path / "out")
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", found)
    assert metrics["fallback_tensors"] == (14 if type == "q4_k_m" else 2)
    assert any("rows of 80" in warning for warning in warnings)
    assert divergence(source, tmp_path / "out") < 0.2


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(tmp_path: Path, same: bool) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    weights = load_file(source / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(
        weights | {"lm_head.weight": embedding.clone() if same else embedding.flip(0)}, source / "model.safetensors", {"format": "pt"}
    )
    if not same:
        with pytest.raises(UnusableModel, match="tie_word_embeddings") as refused:
            write(source, tmp_path / "out", "f32")
        assert refused.value.key == "model"
        config = json.loads((source / "config.json").read_text())  # as a base is normalised
        (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write(source, tmp_path / str(same), "f32")
    assert ("output.weight" in types_in(tmp_path / str(same))) is not same
    assert divergence(source, tmp_path / str(same)) < 1e-9


def test_float64_weights_become_f32(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", dtype=torch.float64)
    export_gguf(source, tmp_path / "out", GgufSettings(type="q8_0"), context=Context())
    assert types_in(tmp_path / "out")["token_embd.weight"] == "F32"


def test_the_file_names_what_it_was_made_of(checkpoint: Path, tmp_path: Path) -> None:
    origin = Origin("SmolLM2-135M", "HuggingFaceTB", "https://huggingface.co/HuggingFaceTB/SmolLM2-135M", "93efa2f", "apache-2.0")
    export_gguf(checkpoint, tmp_path, GgufSettings(type="f16"), origin=origin, context=Context())
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    told = {key.removeprefix("general."): field.contents() for key, field in fields.items() if key.startswith("general.")}
    assert told["name"] == told["base_model.0.name"] == "SmolLM2-135M" and told["license"] == "apache-2.0"
    assert told["base_model.count"] == 1 and told["base_model.0.organization"] == "HuggingFaceTB"
    assert told["base_model.0.repo_url"] == origin.url and told["base_model.0.version"] == "93efa2f"


def test_sliding_attention_cuts_the_context(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "mistral", sliding_window=64)
    warnings: list[str] = []
    export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context(warn=warnings.append))
    assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields["llama.context_length"].contents() == 64
    assert "128 to the window of 64" in warnings[0]


def test_what_f16_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(Incompatible, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 100000.*bf16"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def planned(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint)


def with_config(checkpoint: Checkpoint, layout: str = "dense", **config: object) -> Checkpoint:
    made = of_type(checkpoint, str(config["model_type"])) if config.get("model_type") in ARCHITECTURES else checkpoint
    return dataclasses.replace(made, layout=layout, config=made.config | config)


GEMMA = {"model_type": "gemma3_text", "query_pre_attn_scalar": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("key", "pattern", "settings", "config"),
    [
        ("type", "'q5' is not known", {"type": "q5"}, {}),
        ("embedding_type", "'iq2_xs' is not one of", {"type": "q8_0", "embedding_type": "iq2_xs"}, {}),
        ("embedding_type", "multiple of 256; hidden_size is 64", {"type": "q8_0", "embedding_type": "q6_k"}, {}),
        ("importance", "importance: true", {"type": "iq3_xxs"}, {}),
        ("importance", "weighs nothing in q8_0", {"type": "q8_0", "importance": True}, {}),
        ("requantize", "never rounded", {"type": "q4_0", "requantize": True}, {}),
        ("requantize", "nothing a second time", {"type": "carry", "requantize": True}, {"layout": "gptq", "quantization_config": GPTQ}),
        ("head_type", "one tensor", {"type": "f32", "head_type": "f16"}, {}),
        ("type", "no codes to carry", {"type": "carry"}, {}),
        ("type", "a second time", {"type": "q4_0"}, {"layout": "gptq", "quantization_config": GPTQ}),
        ("type", "3 bits.*requantize: true", {"type": "carry"}, {"layout": "gptq", "quantization_config": GPTQ | {"bits": 3}}),
        ("type", "group_size 16.*requantize: true", {"type": "carry"}, {"layout": "gptq", "quantization_config": GPTQ | {"group_size": 16}}),
        ("type", "group_size 48.*requantize: true", {"type": "carry"}, {"layout": "gptq", "quantization_config": GPTQ | {"group_size": 48}}),
        ("type", "static_groups.*requantize: true", {"type": "carry"}, {"layout": "gptq", "quantization_config": GPTQ | {"desc_act": True}}),
        ("type", "symmetric: true.*requantize: true", {"type": "carry"}, {"layout": "gptq", "quantization_config": GPTQ | {"bits": 8, "sym": False}}),
        ("type", "multiple of 32.*mlp.down_proj", {"type": "q8_0"}, {"intermediate_size": 120, "hidden_size": 72, "head_dim": 18}),
        ("embedding_type", "hidden_size is 72", {"type": "f16", "embedding_type": "q8_0"}, {"hidden_size": 72}),
        ("uses", "'gpt_neox'", {"type": "f16"}, {"model_type": "gpt_neox"}),
        ("uses", "'gelu'", {"type": "f16"}, {"hidden_act": "gelu"}),
        ("uses", "longrope", {"type": "f16"}, {"rope_parameters": {"rope_type": "longrope"}}),
        ("uses", "llama3", {"type": "f16"}, {"model_type": "qwen3", "rope_parameters": LLAMA3}),
        ("uses", "attention_factor", {"type": "f16"}, {"rope_parameters": YARN | {"attention_factor": 1.0}}),
        ("uses", "heads x head_dim", {"type": "f16"}, {"model_type": "qwen2", "num_attention_heads": 2}),
        ("uses", "no_rope_layers", {"type": "f16"}, {"model_type": "smollm3", "no_rope_layers": [1, 0]}),
        ("uses", "llama3", {"type": "f16"}, {"model_type": "smollm3", "rope_parameters": LLAMA3}),
        ("uses", "multiples of 256", {"type": "f16"}, {"model_type": "phi3", "rope_parameters": LONGROPE}),
        ("uses", "query_pre_attn_scalar 256", {"type": "f16"}, GEMMA | {"query_pre_attn_scalar": 256}),
        ("uses", "attn_logit_softcapping", {"type": "f16"}, GEMMA | {"attn_logit_softcapping": 50.0}),
        ("uses", "use_bidirectional_attention", {"type": "f16"}, GEMMA | {"use_bidirectional_attention": True}),
        ("uses", "'silu'", {"type": "f16"}, GEMMA | {"hidden_activation": "silu"}),
        ("uses", "attention biases", {"type": "f16"}, {"model_type": "qwen3", "attention_bias": True}),
    ],
)  # fmt: skip
def test_refused_before_any_work(planned: Checkpoint, key: str, pattern: str, settings: dict[str, Any], config: dict[str, Any]) -> None:
    with pytest.raises(Incompatible, match=pattern) as refused:
        check_gguf(with_config(planned, **config), GgufSettings(**settings))
    assert refused.value.key == key


@pytest.mark.parametrize("absent", ["tie_word_embeddings", "head_dim", "rope_parameters", "num_key_value_heads"])
def test_an_absent_setting_is_not_guessed(planned: Checkpoint, absent: str) -> None:
    config = {key: value for key, value in planned.config.items() if key != absent}
    with pytest.raises(UnusableModel, match=absent) as refused:
        check_gguf(dataclasses.replace(planned, config=config), GgufSettings(type="f16"))
    assert refused.value.key == "model"


def test_yarn_needs_its_original_length(planned: Checkpoint) -> None:
    rope = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    with pytest.raises(UnusableModel, match="original_max_position_embeddings"):
        check_gguf(with_config(planned, rope_parameters=rope), GgufSettings(type="f16"))


def test_planned_checkpoints_are_taken(planned: Checkpoint) -> None:
    check_gguf(
        with_config(dataclasses.replace(planned, path=Path("/nowhere")), "gptq", quantization_config=GPTQ),
        GgufSettings(type="carry", embedding_type="q8_0"),
    )


def test_a_missing_runtime_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"edgepress\[llamacpp\]"):
        export_gguf(checkpoint, tmp_path, GgufSettings(type="f16"), context=Context())
